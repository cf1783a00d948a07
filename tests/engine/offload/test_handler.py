"""The transfer handler between two CPU tensors, compared with a plain Python model."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import CHUNK_ALIGNMENT_BYTES, choose_blocks_per_chunk
from pdlaunch.engine.offload.copies import (
    Copy,
    OffloadHandler,
    PageCopies,
    chunk_layout,
    copy_by_torch,
    copy_on_host,
    merge_runs,
)
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import Direction, TransferSpec
from pdlaunch.errors import TransferError, TransferSpecError
from tests.engine.offload.transfer_model import (
    Geometry,
    block_choices,
    geometries,
    host_content,
    model_transfer,
    spans,
)
from tests.engine.offload.waiting import Waiter

HYBRID = Geometry([[32], [16, 48]], [8, 6], blocks_per_chunk=2, num_chunks=8)


def make_host(geometry: Geometry, groups: list[list[torch.Tensor]]) -> HostMemory:
    layout = chunk_layout(groups, geometry.blocks_per_chunk)
    host = HostMemory(
        geometry.num_chunks,
        layout.chunk_bytes,
        pin=False,
        progress=lambda *_: None,
        piece_bytes=7 * layout.chunk_bytes,
    )
    for piece in host.pieces:
        piece.random_(0, 256)
    return host


def make_handler(
    geometry: Geometry, copy: Copy = copy_on_host
) -> tuple[OffloadHandler, list[list[torch.Tensor]], HostMemory, Waiter]:
    groups = geometry.new_groups()
    host = make_host(geometry, groups)
    waiter = Waiter()
    handler = OffloadHandler(groups, host, geometry.blocks_per_chunk, copy=copy, wake=waiter.wake)
    return handler, groups, host, waiter


@pytest.mark.parametrize("copy", [copy_on_host, copy_by_torch])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_stores_and_loads_equal_the_model(copy: Copy, data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    handler, groups, host, waiter = make_handler(geometry, copy)
    expected_groups = [[tensor.clone() for tensor in group] for group in groups]
    expected_host = host_content(host)
    for job_id in range(data.draw(st.integers(1, 3))):
        sizes, indices, chunk_ids = data.draw(spans(geometry))
        for direction in ("store", "load"):
            block_ids = data.draw(block_choices(geometry, sizes))
            spec = TransferSpec(direction, block_ids, sizes, indices, chunk_ids)
            model_transfer(spec, geometry, expected_groups, expected_host)
            handler.transfer_async(job_id, spec)
            (result,) = waiter.results(handler, 1)
            assert (result.job_id, result.direction, result.ok) == (job_id, direction, True)
            assert result.num_bytes == sum(
                size * sum(pages) for size, pages in zip(sizes, geometry.page_bytes, strict=True)
            )
    assert torch.equal(host_content(host), expected_host)
    for group, expected in zip(groups, expected_groups, strict=True):
        for tensor, wanted in zip(group, expected, strict=True):
            assert torch.equal(tensor, wanted)
    assert handler.close()


def spec_of(
    direction: Direction = "store",
    block_ids: tuple[int, ...] = (7, 4, 3, 5, 0),
    group_sizes: tuple[int, ...] = (3, 2),
    block_indices: tuple[int, ...] = (1, 6),
    chunk_ids: tuple[int, ...] = (5, 2, 0),
) -> TransferSpec:
    return TransferSpec(direction, block_ids, group_sizes, block_indices, chunk_ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of(block_ids=(7, 4, 3, 5)), "group 1 needs 2 block_ids, 1 are left for it"),
        (spec_of(block_ids=(7, 4)), "group 0 needs 3 block_ids, 2 are left for it"),
        (
            spec_of(block_ids=(7, 4, 3, 5, 0, 1)),
            "block_ids has 6 entries, the groups up to group 1 need 5",
        ),
        (spec_of(chunk_ids=(5, 2)), "group 1 needs 1 chunk_ids, 0 are left for it"),
        (
            spec_of(chunk_ids=(5, 2, 0, 1)),
            "chunk_ids has 4 entries, the groups up to group 1 need 3",
        ),
        (spec_of(block_indices=(1, 7)), "group 1 needs 2 chunk_ids, 1 are left for it"),
        (
            spec_of(block_indices=(0, 6), block_ids=(7, 4, 8, 5, 0)),
            "group 0: 8 in block_ids is not an id, ids are below 8",
        ),
        (
            spec_of(block_ids=(7, 4, 3, 6, 0)),
            "group 1: 6 in block_ids is not an id, ids are below 6",
        ),
        (
            spec_of(block_ids=(7, 4, -1, 5, 0)),
            "group 0: -1 in block_ids is not an id, ids are below 8",
        ),
        (spec_of(chunk_ids=(5, 8, 0)), "group 0: 8 in chunk_ids is not an id, ids are below 8"),
        (
            spec_of(block_ids=(7, 4, 7, 5, 0)),
            "group 0: 7 stands 2 times in block_ids, once is allowed",
        ),
        (spec_of(chunk_ids=(5, 2, 5)), "group 0 and group 1 both use chunk 5"),
        (
            spec_of(group_sizes=(3,)),
            "group_sizes has 1 entries, the KV cache has 2 groups: wrong from group 1 on",
        ),
        (
            spec_of(block_indices=()),
            "block_indices has 0 entries, the KV cache has 2 groups: wrong from group 0 on",
        ),
        (spec_of(group_sizes=(3, -2)), "group 1: group_sizes is -2, the least is 0"),
        (spec_of(block_indices=(-1, 6)), "group 0: block_indices is -1, the least is 0"),
        (spec_of(direction="sideways"), "direction is 'sideways'"),  # type: ignore[arg-type]
    ],
)
def test_refuses_specs_that_do_not_fit(spec: TransferSpec, message: str) -> None:
    handler, _, host, _ = make_handler(HYBRID)
    before = host_content(host)
    with pytest.raises(TransferSpecError) as error:
        handler.transfer_async(1, spec)
    assert message in str(error.value)
    assert handler.close()
    assert handler.get_finished() == []
    assert torch.equal(host_content(host), before)


def test_small_blocks_share_chunks_beside_a_gpu() -> None:
    sizes = [kib * 1024 for kib in (1, 4, 16, 20, 64, 100, 128, 129, 256, 2048)]
    assert [choose_blocks_per_chunk(size, "cuda") for size in sizes] == [
        16,
        16,
        16,
        12,
        4,
        2,
        2,
        1,
        1,
        1,
    ]
    assert {choose_blocks_per_chunk(size, "cpu") for size in sizes} == {1}


def test_skips_slots_before_an_unaligned_start() -> None:
    handler, groups, host, waiter = make_handler(HYBRID)
    before = host_content(host)
    handler.transfer_async(1, spec_of())
    waiter.results(handler, 1)
    chunk = host_content(host)
    assert torch.equal(chunk[5, :32], before[5, :32])
    assert torch.equal(chunk[5, 32:64], groups[0][0][7])
    assert torch.equal(chunk[2, :32], groups[0][0][4])
    assert torch.equal(chunk[0, :64], torch.cat([groups[1][0][5], groups[1][1][5]]))
    assert handler.close()


def test_a_transfer_of_nothing_finishes() -> None:
    handler, _, _, waiter = make_handler(HYBRID)
    handler.transfer_async(3, TransferSpec("load", [], [0, 0], [0, 0], []))
    (result,) = waiter.results(handler, 1)
    assert (result.job_id, result.ok, result.num_bytes) == (3, True, 0)
    assert handler.close()


class GatedCopy:
    """Stores wait for the gate, loads do not; block 0 cannot be copied."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(self, copies: PageCopies, direction: Direction) -> None:
        if direction == "store":
            assert self.gate.wait(60)
        if 0 in copies.block_ids:
            raise TransferError("block 0 is broken")
        copy_on_host(copies, direction)


def test_directions_do_not_wait_for_each_other_and_failures_are_reported() -> None:
    method = GatedCopy()
    handler, _, _, waiter = make_handler(HYBRID, method)
    handler.transfer_async(1, spec_of("store", block_ids=(7, 4, 3, 5, 1)))
    handler.transfer_async(2, spec_of("store"))
    handler.transfer_async(3, spec_of("load", block_ids=(7, 4, 3, 5, 1)))
    assert [result.job_id for result in waiter.results(handler, 1)] == [3]
    assert handler.get_finished() == []
    method.gate.set()
    first, second = waiter.results(handler, 2)
    assert (first.job_id, first.ok) == (1, True)
    assert (second.job_id, second.ok, second.num_bytes) == (2, False, 0)
    assert "block 0 is broken" in second.error
    assert handler.close()


def test_close_says_when_a_copy_still_runs() -> None:
    method = GatedCopy()
    handler, _, _, waiter = make_handler(HYBRID, method)
    handler.transfer_async(1, spec_of("store"))
    assert not handler.close(timeout_s=0.01)
    method.gate.set()
    assert waiter.results(handler, 1)


def test_runs_join_neighbours_and_stop_at_the_border_of_a_piece() -> None:
    pages = torch.zeros(8, 4096, dtype=torch.uint8)
    host = HostMemory(8, 4096, pin=False, progress=lambda *_: None, piece_bytes=2 * 4096)
    places = np.array([2, 3, 4, 5, 7]), host, np.arange(5), np.zeros(5, dtype=np.int64)
    runs = merge_runs(PageCopies(pages, *places))
    assert runs.device_offsets.tolist() == [8192, 16384, 28672]
    assert runs.host_pieces.tolist() == [0, 1, 2]
    assert runs.host_offsets.tolist() == [0, 0, 0]
    assert runs.sizes.tolist() == [8192, 8192, 4096]


def test_groups_may_share_one_tensor() -> None:
    pages = torch.arange(8 * 16, dtype=torch.uint8).view(8, 16)
    host = HostMemory(4, CHUNK_ALIGNMENT_BYTES, pin=False, progress=lambda *_: None)
    waiter = Waiter()
    handler = OffloadHandler([[pages], [pages]], host, 1, wake=waiter.wake)
    original = pages.clone()
    handler.transfer_async(1, TransferSpec("store", [1, 6], [1, 1], [0, 5], [2, 3]))
    waiter.results(handler, 1)
    handler.transfer_async(2, TransferSpec("load", [6, 1], [1, 1], [0, 5], [2, 3]))
    waiter.results(handler, 1)
    assert torch.equal(pages[6], original[1])
    assert torch.equal(pages[1], original[6])
    assert handler.close()
