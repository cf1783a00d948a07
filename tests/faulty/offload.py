"""Faults for the host tier and the runner of a rank."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from pdlaunch.engine.offload.planner import JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.step import StepPlan
from tests.faulty.transfers import FaultPlan

_WAIT_S = 0.02  # time between two looks at whether ends may be seen again


class FaultyRunner(ModelRunner):
    """Crashes in a step with the plan's poison, as with a bug in a kernel; slows steps down."""

    def __init__(self, faults: FaultPlan, *arguments: Any, **setup: Any) -> None:
        super().__init__(*arguments, **setup)
        self._faults = faults

    def launch(self, plan: StepPlan) -> LaunchedStep:
        time.sleep(self._faults.step_s)
        if any(self._faults.poison in row.token_ids for row in plan.new_rows):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().launch(plan)


class FaultyOffloadWorker(OffloadWorker):
    """Changes a byte of some chunks once their checksums are taken, and reports no end of a copy
    while the plan says so.
    """

    def __init__(self, faults: FaultPlan, **setup: Any) -> None:
        super().__init__(**setup)
        self._faults = faults
        self._stores: dict[int, OffloadJob] = {}
        self._held_back: list[JobFinished] = []
        self._num_chunks_stored = 0

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        self._stores |= {job.job_id: job for job in jobs if job.direction == "store"}
        super().submit(jobs)

    def take_finished(self) -> list[JobFinished]:
        for report in super().take_finished():
            self._spoil_chunks(report)
            self._held_back.append(report)
        if self._held_back and self._faults.copies_wait():
            timer = threading.Timer(_WAIT_S, self._wake)
            timer.daemon = True
            timer.start()
            return []
        finished, self._held_back = self._held_back, []
        return finished

    def _spoil_chunks(self, report: JobFinished) -> None:
        job = self._stores.pop(report.job_id, None)
        for host_id in job.host_ids if job is not None and report.ok else ():
            self._num_chunks_stored += 1
            source = self._faults.of_chunk(self._num_chunks_stored)
            if source is not None:
                block = self.host.block(host_id)
                block[source.randrange(len(block))] ^= source.randrange(1, 256)
