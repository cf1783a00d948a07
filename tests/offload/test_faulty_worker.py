"""The worker for tests of faults: bad memory is found by the load, late ends are told after all."""

from __future__ import annotations

import random
import threading

import torch

from pdlaunch.offload.faulty_worker import ChunkFaults, FaultyOffloadWorker
from pdlaunch.offload.jobs import JobFinished, OffloadJob
from pdlaunch.offload.tier import HeadSlice
from tests.offload.test_worker import make_layout

STORE = OffloadJob(1, "store", [3, 4], [2, 0], [0, 0], [5, 6], [b"a", b"b"])
LOAD = OffloadJob(2, "load", [8, 9], [2, 0], [0, 0], [5, 6], [b"a", b"b"])


def new_worker(faults: ChunkFaults, wakes: threading.Semaphore) -> FaultyOffloadWorker:
    layout = make_layout()
    return FaultyOffloadWorker(
        faults,
        kv_cache=torch.ones((16, *layout.block_shape()), dtype=torch.bfloat16),
        layout=layout,
        heads=HeadSlice(0, 2),
        host_memory_bytes=12 * 4096,
        progress=lambda *_: None,
        wake=wakes.release,
    )


def test_the_second_chunk_goes_bad_and_every_end_is_told() -> None:
    wakes = threading.Semaphore(0)
    worker = new_worker(
        ChunkFaults(lambda index: random.Random(1) if index == 2 else None, lambda _index: 0.01),
        wakes,
    )
    found: list[JobFinished] = []
    for job in (STORE, LOAD):
        worker.submit([job])
        while not found or found[-1].job_id != job.job_id:
            assert wakes.acquire(timeout=60)
            found += worker.take_finished()
    store, load = found
    assert store.ok
    assert (load.ok, load.failed_chunk_ids) == (False, [6])
    worker.close()


def test_an_end_is_told_when_it_may_be() -> None:
    wakes, waits = threading.Semaphore(0), iter([True, True, True])
    worker = new_worker(
        ChunkFaults(lambda index: None, lambda _index: 0.0, lambda: next(waits, False)), wakes
    )
    worker.submit([STORE])
    found: list[JobFinished] = []
    while not found:
        assert wakes.acquire(timeout=60)
        found += worker.take_finished()
    assert [report.job_id for report in found] == [STORE.job_id]
    assert next(waits, None) is None, "it has been looked for as long as it had to wait"
    worker.close()
