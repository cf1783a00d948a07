"""The queues between KV cache and host memory, on a CPU and on a GPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pdlaunch.engine.kvcache.groups import aligned_chunk_bytes, choose_blocks_per_chunk
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.jobs import DIRECTIONS, Direction, JobFinished
from pdlaunch.engine.offload.worker import (
    BlockPlaces,
    Copy,
    CopyQueue,
    Runs,
    batch_copy,
    copy_runs,
    merge_runs,
)
from pdlaunch.errors import TransferError

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu = pytest.param("cuda", marks=on_a_gpu)


class Queues:
    """Both directions between random blocks and host memory in pieces of seven chunks."""

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        num_chunks: int,
        per_chunk: int = 1,
        device: str = "cpu",
        copy: Copy | None = None,
    ) -> None:
        self.blocks = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8).to(device)
        chunk_bytes = aligned_chunk_bytes(per_chunk * block_bytes)
        self.host = HostMemory(
            num_chunks,
            chunk_bytes,
            pin=device == "cuda",
            progress=lambda *_: None,
            piece_bytes=7 * chunk_bytes,
        )
        self.ends: queue.SimpleQueue[JobFinished] = queue.SimpleQueue()
        self._queues = {
            direction: CopyQueue(direction, self.blocks, self.host, self.ends.put, copy)
            for direction in DIRECTIONS
        }

    def submit(self, job_id: int, direction: Direction, places: BlockPlaces) -> None:
        self._queues[direction].submit(job_id, places)

    def run(self, direction: Direction, places: BlockPlaces) -> None:
        self.submit(0, direction, places)
        report = self.ends.get(timeout=60)
        assert report.ok, report.error
        assert report.num_bytes == len(places.block_ids) * self.blocks.shape[1]

    def close(self, timeout_s: float = 60) -> bool:
        ended = [each.close(timeout_s) for each in self._queues.values()]
        if all(ended):
            self.host.close()
        return all(ended)


def places_of(block_ids: object, chunk_ids: object, slots: object = 0) -> BlockPlaces:
    ids, chunks, places = np.broadcast_arrays(block_ids, chunk_ids, slots)
    return BlockPlaces(ids.astype(np.int64), chunks.astype(np.int64), places.astype(np.int64))


@pytest.mark.parametrize("block_bytes", [4096, 12 * 1024, 64 * 1024])
@pytest.mark.parametrize(
    ("device", "make_copy"),
    [
        ("cpu", lambda: copy_runs),
        pytest.param("cuda", lambda: copy_runs, marks=on_a_gpu),
        pytest.param("cuda", batch_copy, marks=on_a_gpu),
    ],
    ids=["cpu", "torch", "batch"],
)
def test_small_blocks_in_long_chunks_go_both_ways_at_once(
    device: str, make_copy: Callable[[], Copy], block_bytes: int
) -> None:
    """The first half is stored while the second one, which was stored before, is loaded elsewhere;
    both begin inside of chunks.
    """
    a_chunk = choose_blocks_per_chunk(block_bytes, "cuda")
    half = 40 * a_chunk - 2
    queues = Queues(
        3 * half, block_bytes, num_chunks=90, per_chunk=a_chunk, device=device, copy=make_copy()
    )
    original = queues.blocks.cpu()
    blocks, chunks = torch.randperm(2 * half).numpy(), torch.randperm(90).numpy()
    elsewhere = torch.randperm(half).numpy() + 2 * half
    first, second = np.arange(half) + a_chunk - 1, np.arange(half) + 2
    stored_now = places_of(blocks[:half], chunks[first // a_chunk], first % a_chunk)
    stored_before = places_of(blocks[half:], chunks[41 + second // a_chunk], second % a_chunk)
    queues.run("store", stored_before)
    queues.submit(1, "store", stored_now)
    queues.submit(2, "load", places_of(elsewhere, stored_before.chunk_ids, stored_before.slots))
    assert all(queues.ends.get(timeout=60).ok for _ in range(2))
    assert torch.equal(queues.blocks[elsewhere].cpu(), original[blocks[half:]])
    queues.blocks.zero_()
    queues.run("load", stored_now)
    assert torch.equal(queues.blocks[blocks[:half]].cpu(), original[blocks[:half]])
    assert queues.close()


def test_runs_join_neighbours_and_stop_at_the_border_of_a_piece() -> None:
    host = HostMemory(8, 4096, pin=False, progress=lambda *_: None, piece_bytes=2 * 4096)
    runs = merge_runs(places_of([2, 3, 4, 5, 7], np.arange(5)), 4096, host)
    assert runs.device_offsets.tolist() == [8192, 16384, 28672]
    assert runs.host_pieces.tolist() == [0, 1, 2]
    assert runs.host_offsets.tolist() == [0, 0, 0]
    assert runs.sizes.tolist() == [8192, 8192, 4096]


class GatedCopy:
    """Stores wait for the gate, loads do not; block 0 cannot be copied."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(
        self, blocks: torch.Tensor, host: HostMemory, runs: Runs, direction: Direction
    ) -> None:
        if direction == "store":
            assert self.gate.wait(60)
        if 0 in runs.device_offsets:
            raise TransferError("block 0 is broken")
        copy_runs(blocks, host, runs, direction)


def test_directions_do_not_wait_for_each_other_and_failures_are_reported() -> None:
    copy = GatedCopy()
    queues = Queues(8, 64, num_chunks=8, copy=copy)
    queues.submit(1, "store", places_of([7, 4], [0, 1]))
    queues.submit(2, "store", places_of([5, 0], [2, 3]))
    queues.submit(3, "load", places_of([6], [5]))
    assert queues.ends.get(timeout=60).job_id == 3
    assert not queues.close(timeout_s=0.01), "a copy still runs"
    copy.gate.set()
    first, second = (queues.ends.get(timeout=60) for _ in range(2))
    assert (first.job_id, first.ok) == (1, True)
    assert (second.job_id, second.ok, second.num_bytes) == (2, False, 0)
    assert "block 0 is broken" in second.error


@pytest.mark.parametrize("device", [gpu])
def test_a_store_is_queued_behind_the_work_that_fills_its_blocks(device: str) -> None:
    queues = Queues(64, 65536, num_chunks=64, device=device)
    torch.cuda._sleep(200_000_000)
    queues.blocks.fill_(7)
    queues.submit(1, "store", places_of(np.arange(64), np.arange(64)))
    assert queues.ends.empty()
    assert queues.ends.get(timeout=60).ok
    assert all(bool((piece == 7).all()) for piece in queues.host.pieces)
    assert queues.close()


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize(
    "broken", [torch.cuda.Stream.wait_stream, torch.cuda.Event.record], ids=["wait", "record"]
)
def test_an_error_of_the_device_is_the_jobs_own(
    broken: object, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the step loop, and with it the engine."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    queues = Queues(8, 4096, num_chunks=8, device=device)
    owner = torch.cuda.Stream if broken is torch.cuda.Stream.wait_stream else torch.cuda.Event
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken.__name__, refuse)  # type: ignore[attr-defined]
        queues.submit(1, "store", places_of([1], [1]))
    report = queues.ends.get(timeout=60)
    assert (report.ok, report.error) == (False, "RuntimeError: CUDA error: out of memory")
    queues.run("store", places_of([1], [1]))
    assert queues.close()
