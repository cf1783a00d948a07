"""The same handler on a GPU moves the bytes that the model moves."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheLayout, choose_blocks_per_chunk, make_groups
from pdlaunch.engine.offload.copies import (
    Copy,
    OffloadHandler,
    batch_copy,
    chunk_layout,
    copy_by_torch,
)
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.spec import TransferSpec
from pdlaunch.engine.offload.tier import HeadSlice
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.transfer.integrity.checksum import KVHasher
from tests.engine.offload.transfer_model import (
    block_choices,
    geometries,
    host_content,
    model_transfer,
    spans,
)
from tests.engine.offload.waiting import Waiter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("make_copy", [batch_copy, lambda: copy_by_torch], ids=["batch", "torch"])
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_equals_the_model(make_copy: Callable[[], Copy], data: st.DataObject) -> None:
    geometry = data.draw(geometries(unit_bytes=16, max_units=8))
    groups = geometry.new_groups("cuda")
    layout = chunk_layout(groups, geometry.blocks_per_chunk)
    host = HostMemory(
        geometry.num_chunks,
        layout.chunk_bytes,
        pin=True,
        progress=lambda *_: None,
        piece_bytes=7 * layout.chunk_bytes,
    )
    for piece in host.pieces:
        piece.random_(0, 256)
    waiter = Waiter()
    handler = OffloadHandler(
        groups, host, geometry.blocks_per_chunk, copy=make_copy(), wake=waiter.wake
    )
    expected_groups = [[tensor.cpu() for tensor in group] for group in groups]
    expected_host = host_content(host)
    sizes, indices, chunk_ids = data.draw(spans(geometry))
    for job_id, direction in enumerate(("store", "load")):
        spec = TransferSpec(
            direction, data.draw(block_choices(geometry, sizes)), sizes, indices, chunk_ids
        )
        model_transfer(spec, geometry, expected_groups, expected_host)
        handler.transfer_async(job_id, spec)
        (result,) = waiter.results(handler, 1)
        assert result.ok, result.error
    assert torch.equal(host_content(host), expected_host)
    for group, expected in zip(groups, expected_groups, strict=True):
        for tensor, wanted in zip(group, expected, strict=True):
            assert torch.equal(tensor.cpu(), wanted)
    assert handler.close()
    host.close()


@pytest.mark.parametrize("make_copy", [batch_copy, lambda: copy_by_torch], ids=["batch", "torch"])
def test_thousands_of_pages_go_there_and_back(make_copy: Callable[[], Copy]) -> None:
    num_blocks = 3000
    pages = torch.randint(0, 256, (num_blocks, 4096), dtype=torch.uint8, device="cuda")
    original = pages.clone()
    host = HostMemory(num_blocks, 4096, pin=True, progress=lambda *_: None, piece_bytes=1000 * 4096)
    waiter = Waiter()
    handler = OffloadHandler([[pages]], host, 1, copy=make_copy(), wake=waiter.wake)
    order, chunks, places = (torch.randperm(num_blocks).numpy() for _ in range(3))
    handler.transfer_async(1, TransferSpec("store", order, [num_blocks], [0], chunks))
    (stored,) = waiter.results(handler, 1)
    pages.zero_()
    handler.transfer_async(2, TransferSpec("load", places, [num_blocks], [0], chunks))
    (loaded,) = waiter.results(handler, 1)
    assert (stored.ok, loaded.ok) == (True, True)
    assert torch.equal(pages[places], original[order])
    assert handler.close()
    host.close()


def test_a_store_is_queued_behind_the_work_that_fills_its_blocks() -> None:
    pages = torch.zeros(64, 65536, dtype=torch.uint8, device="cuda")
    host = HostMemory(64, 65536, pin=True, progress=lambda *_: None)
    waiter = Waiter()
    handler = OffloadHandler([[pages]], host, 1, wake=waiter.wake)
    torch.cuda._sleep(200_000_000)
    pages.fill_(7)
    handler.transfer_async(1, TransferSpec("store", range(64), [64], [0], range(64)))
    assert handler.get_finished() == []
    (result,) = waiter.results(handler, 1)
    assert result.ok
    assert bool((host_content(host) == 7).all())
    assert handler.close()
    host.close()


@pytest.mark.parametrize("page_bytes", [4096, 12 * 1024, 64 * 1024])
def test_small_blocks_in_long_chunks_go_both_ways_at_once(page_bytes: int) -> None:
    """The first half is stored while the second one, which was stored before, is loaded elsewhere;
    spans begin inside chunks.
    """
    a_chunk = choose_blocks_per_chunk(page_bytes, "cuda")
    half = 40 * a_chunk - 2
    pages = torch.randint(0, 256, (3 * half, page_bytes), dtype=torch.uint8, device="cuda")
    layout = chunk_layout([[pages]], a_chunk)
    host = HostMemory(
        90,
        layout.chunk_bytes,
        pin=True,
        progress=lambda *_: None,
        piece_bytes=7 * layout.chunk_bytes,
    )
    original = pages.cpu()
    waiter = Waiter()
    handler = OffloadHandler([[pages]], host, a_chunk, wake=waiter.wake)
    blocks, chunks = torch.randperm(2 * half).numpy(), torch.randperm(90).numpy()
    first, second = (blocks[:half], chunks[:41]), (blocks[half:], chunks[41:81])
    elsewhere = torch.randperm(half).numpy() + 2 * half
    handler.transfer_async(1, TransferSpec("store", second[0], [half], [2], second[1]))
    (stored,) = waiter.results(handler, 1)
    handler.transfer_async(2, TransferSpec("store", first[0], [half], [a_chunk - 1], first[1]))
    handler.transfer_async(3, TransferSpec("load", elsewhere, [half], [2], second[1]))
    results = [stored, *waiter.results(handler, 2)]
    assert all(result.ok for result in results), results
    assert torch.equal(pages[elsewhere].cpu(), original[second[0]])
    pages.zero_()
    handler.transfer_async(4, TransferSpec("load", first[0], [half], [a_chunk - 1], first[1]))
    (loaded,) = waiter.results(handler, 1)
    assert loaded.ok, loaded.error
    assert torch.equal(pages[first[0]].cpu(), original[first[0]])
    assert handler.close()
    host.close()


def test_loads_are_proven_where_they_arrive() -> None:
    """Checksums by the kernel, over blocks on the device."""
    layout = KVCacheLayout(
        make_groups([None] * 4), num_kv_heads=2, head_dim=64, block_size=16, dtype_bytes=2
    )
    kv_cache = torch.randn((16, *layout.block_shape()), device="cuda").to(torch.bfloat16)
    wakes = threading.Semaphore(0)
    worker = OffloadWorker(
        kv_cache=kv_cache,
        layout=layout,
        heads=HeadSlice(0, 2),
        host_memory_bytes=8 * layout.block_bytes,
        device_hasher=KVHasher(kv_cache, layout),
        progress=lambda *_: None,
        wake=wakes.release,
    )

    def run(job: OffloadJob) -> JobFinished:
        worker.submit([job])
        while not (finished := worker.take_finished()):
            assert wakes.acquire(timeout=60)
        return finished[0]

    hashes = [b"a", b"b"]
    assert run(OffloadJob(1, "store", [3, 9], [2], [0], [2, 0], hashes)).ok
    assert worker.checksums(2) == [
        tuple(row) for row in KVHasher(kv_cache.cpu(), layout).checksums([3], slice(None))
    ]
    loaded = run(OffloadJob(2, "load", [10, 11], [2], [0], [2, 0], hashes))
    assert loaded.ok, loaded.error
    assert torch.equal(kv_cache[[10, 11]], kv_cache[[3, 9]])
    worker.chunk(0)[17] ^= 1
    spoiled = run(OffloadJob(3, "load", [12, 13], [2], [0], [2, 0], hashes))
    assert (spoiled.ok, spoiled.failed_chunk_ids) == (False, [0])
    worker.close()
