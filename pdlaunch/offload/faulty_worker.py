"""A host tier whose memory goes bad, for tests and ``pdlaunch smoke --chaos`` only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from pdlaunch.offload.jobs import JobFinished, OffloadJob
from pdlaunch.offload.worker import OffloadWorker

CorruptChunk = Callable[[int], random.Random | None]
"""Number of the stored chunk -> what the place and value of its wrong byte are drawn from; None: it stays as it is."""


class FaultyOffloadWorker(OffloadWorker):
    """Changes a byte of some chunks once they are stored and their checksums are taken."""

    def __init__(self, corrupt: CorruptChunk, **setup: Any) -> None:
        super().__init__(**setup)
        self._corrupt = corrupt
        self._stores: dict[int, OffloadJob] = {}
        self._num_stored_chunks = 0

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        self._stores |= {job.job_id: job for job in jobs if job.direction == "store"}
        super().submit(jobs)

    def take_finished(self) -> list[JobFinished]:
        finished = super().take_finished()
        for report in finished:
            job = self._stores.pop(report.job_id, None)
            for chunk_id in job.chunk_ids if job is not None and report.ok else ():
                self._spoil(chunk_id)
        return finished

    def _spoil(self, chunk_id: int) -> None:
        self._num_stored_chunks += 1
        source = self._corrupt(self._num_stored_chunks)
        if source is not None:
            place = source.randrange(self.block_bytes)
            self.chunk(chunk_id)[place] ^= source.randrange(1, 256)
