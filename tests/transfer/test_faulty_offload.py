"""Injected faults of the host tier are noticed: bad memory by the load, late ends are told after
all.
"""

from __future__ import annotations

import random
import threading

import torch

from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.transfer.connectors.faults import FaultPlan
from pdlaunch.transfer.connectors.faulty import FaultyOffloadWorker
from tests.engine.offload.test_worker import make_layout

STORE = OffloadJob(1, "store", [3, 4], [2, 0], [0, 0], [5, 6], [b"a", b"b"])
LOAD = OffloadJob(2, "load", [8, 9], [2, 0], [0, 0], [5, 6], [b"a", b"b"])


def new_worker(faults: FaultPlan, wakes: threading.Semaphore) -> FaultyOffloadWorker:
    layout = make_layout()
    return FaultyOffloadWorker(
        faults,
        kv_cache=torch.ones((16, *layout.block_shape()), dtype=torch.bfloat16),
        layout=layout,
        host_memory_bytes=12 * 4096,
        progress=lambda *_: None,
        wake=wakes.release,
    )


class SecondChunk(FaultPlan):
    def of_chunk(self, index: int) -> random.Random | None:
        return random.Random(1) if index == 2 else None


class Waiting(FaultPlan):
    waits: list[bool]

    def copies_wait(self) -> bool:
        return bool(self.waits) and self.waits.pop()


def test_the_second_chunk_goes_bad_and_every_end_is_told() -> None:
    wakes = threading.Semaphore(0)
    worker = new_worker(
        SecondChunk(copy_slow_s=0.01),
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
    wakes, waits = threading.Semaphore(0), [True, True, True]
    plan = Waiting(chunk_rate=0, copy_slow_s=0, waits=[])
    plan = plan.model_copy(update={"waits": waits})
    worker = new_worker(plan, wakes)
    worker.submit([STORE])
    found: list[JobFinished] = []
    while not found:
        assert wakes.acquire(timeout=60)
        found += worker.take_finished()
    assert [report.job_id for report in found] == [STORE.job_id]
    assert not waits, "it has been looked for as long as it had to wait"
    worker.close()
