"""Slows the host tier down and lets its memory go bad, as a ``FaultPlan`` says."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.testing.faults import FaultPlan

_TIMER_SLACK_S = 0.001
"""Added to a timer: a wake before the report is due would be in vain."""
_WAIT_S = 0.02
"""Time between two looks at whether ends may be seen again."""


class FaultyOffloadWorker(OffloadWorker):
    """Reports the ends of copies late, and changes a byte of some chunks once their checksums are
    taken.
    """

    def __init__(self, faults: FaultPlan, **setup: Any) -> None:
        super().__init__(**setup)
        self._faults = faults
        self._stores: dict[int, OffloadJob] = {}
        self._late: list[tuple[float, JobFinished]] = []
        """Reports that are held back, with the instants at which they are due."""
        self._num_chunks_stored = 0
        self._num_copies = 0

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        self._stores |= {job.job_id: job for job in jobs if job.direction == "store"}
        super().submit(jobs)

    def take_finished(self) -> list[JobFinished]:
        for report in super().take_finished():
            self._hold_back(report)
        now = time.monotonic()
        finished = [report for due_at, report in self._late if due_at <= now]
        self._late = [(due_at, report) for due_at, report in self._late if due_at > now]
        if not finished or not self._faults.copies_wait():
            return finished
        for report in finished:
            self._report_in(_WAIT_S, report)
        return []

    def _hold_back(self, report: JobFinished) -> None:
        job = self._stores.pop(report.job_id, None)
        for chunk_id in job.chunk_ids if job is not None and report.ok else ():
            self._spoil(chunk_id)
        self._num_copies += 1
        self._report_in(self._faults.copy_delay_s(self._num_copies), report)

    def _report_in(self, delay_s: float, report: JobFinished) -> None:
        self._late.append((time.monotonic() + delay_s, report))
        timer = threading.Timer(delay_s + _TIMER_SLACK_S, self._wake)
        timer.daemon = True
        timer.start()

    def _spoil(self, chunk_id: int) -> None:
        self._num_chunks_stored += 1
        source = self._faults.of_chunk(self._num_chunks_stored)
        if source is not None:
            self.chunk(chunk_id)[source.randrange(self.block_bytes)] ^= source.randrange(1, 256)
