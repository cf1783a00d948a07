"""Jobs that the scheduler gives to the offload worker of every rank, and their reports.
Both are plain values that a message can carry.

Ownership: the blocks and chunks of a job belong to it from the moment it is made until all ranks
have reported it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdlaunch.engine.offload.spec import Direction, TransferSpec


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """Describes one transfer, the same for all ranks; each rank moves its own heads of the blocks.
    The fields are those of ``TransferSpec``.
    """

    job_id: int
    direction: Direction
    block_ids: list[int]
    group_sizes: list[int]
    block_indices: list[int]
    chunk_ids: list[int]
    chunk_hashes: list[bytes]
    """The hash of each chunk's last block: a store writes it there, a load expects it there."""

    @property
    def spec(self) -> TransferSpec:
        return TransferSpec(
            self.direction, self.block_ids, self.group_sizes, self.block_indices, self.chunk_ids
        )


@dataclass(frozen=True, slots=True)
class JobFinished:
    """A job has ended: nothing reads or writes its blocks and chunks any more."""

    job_id: int
    ok: bool
    """All bytes are where they belong; those of a load are proven to be those that were stored."""
    error: str = ""
    failed_chunk_ids: list[int] = field(default_factory=list)
    """Chunks whose content was not what this load expected."""
    num_bytes: int = 0
    seconds: float = 0.0  # duration of the copy alone


class JobMerger:
    """Merges the reports of all ranks into one: a block is moved only when every rank has moved its
    heads.
    """

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._reports: dict[int, list[JobFinished]] = {}

    def add(self, report: JobFinished) -> JobFinished | None:
        """Return the report of the whole engine once the last rank has sent its own, else None."""
        reports = self._reports.setdefault(report.job_id, [])
        reports.append(report)
        if len(reports) < self._tp_size:
            return None
        del self._reports[report.job_id]
        return JobFinished(
            job_id=report.job_id,
            ok=all(one.ok for one in reports),
            error="; ".join(sorted({one.error for one in reports if one.error})),
            failed_chunk_ids=sorted(
                {chunk_id for one in reports for chunk_id in one.failed_chunk_ids}
            ),
            num_bytes=sum(one.num_bytes for one in reports),
            seconds=max(one.seconds for one in reports),
        )
