"""Totals of an engine's host tier since it started, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdlaunch.offload.jobs import JobFinished
from pdlaunch.offload.spec import Direction


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """Totals that never change; a field that begins with ``num_`` says how many there are now."""

    num_chunks: int = 0
    num_used_chunks: int = 0
    stored_bytes: int = 0
    stored_seconds: float = 0.0
    loaded_bytes: int = 0
    loaded_seconds: float = 0.0
    stores: int = 0
    loads: int = 0
    failed_stores: int = 0
    failed_loads: int = 0
    """Loads after which the prompt was computed instead."""
    bad_chunks: int = 0
    """Chunks that did not hold what was stored there."""
    evicted_chunks: int = 0
    refused_chunks: int = 0
    """Chunks that were not stored because every chunk was in flight."""

    def with_job(self, direction: Direction, report: JobFinished) -> OffloadStats:
        """Return these totals with one more job."""
        if direction == "store":
            return replace(
                self,
                stored_bytes=self.stored_bytes + report.num_bytes,
                stored_seconds=self.stored_seconds + report.seconds,
                stores=self.stores + 1,
                failed_stores=self.failed_stores + (not report.ok),
            )
        return replace(
            self,
            loaded_bytes=self.loaded_bytes + report.num_bytes,
            loaded_seconds=self.loaded_seconds + report.seconds,
            loads=self.loads + 1,
            failed_loads=self.failed_loads + (not report.ok),
            bad_chunks=self.bad_chunks + len(report.failed_chunk_ids),
        )
