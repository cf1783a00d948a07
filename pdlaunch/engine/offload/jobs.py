"""Jobs that the scheduler gives to the offload worker of every rank, and their reports. No torch.

A host chunk holds ``blocks_per_chunk`` device blocks of one group, consecutive in the request. A
job may begin and end inside a chunk. Two groups, two blocks a chunk::

    block_ids      [ 7  4  9 | 3  8 ]      group_sizes  [3, 2]
    block_indices  [ 1       | 6    ]      logical index of each group's first block
    chunk_ids      [ 5   2   | 0    ]      group 0 skips 1 % 2 = 1 slot: ceil((3 + 1) / 2) chunks

    chunk 5  [ .  7 ]    chunk 2  [ 4  9 ]    chunk 0  [ 3  8 ]

Ownership: the blocks and chunks of a job belong to it from the moment it is made until all ranks
have reported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pdlaunch.errors import TransferSpecError

Direction = Literal["store", "load"]  # ``store``: device to host; ``load``: host to device

DIRECTIONS: tuple[Direction, Direction] = ("store", "load")


class ChunkKey(NamedTuple):
    """Names the content of a chunk."""

    group: int
    block_hash: bytes
    """The hash of the chunk's last block, which covers model, salt and all tokens so far."""


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """Describes one transfer, the same for all ranks; each rank moves its own heads of the blocks.

    The lists are flat and ordered by group. A group may be empty.
    """

    job_id: int
    direction: Direction
    block_ids: list[int]  # device blocks
    group_sizes: list[int]  # number of blocks of each group
    block_indices: list[int]
    """The logical index of each group's first block in the request; of an empty group, anything."""
    chunk_ids: list[int]
    """Host chunks, ceil((size + skip) / blocks_per_chunk) of each group."""
    chunk_hashes: list[bytes]
    """The hash of each chunk's last block: a store writes it there, a load expects it there."""


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
    seconds: float = 0.0  # duration of the copy alone, without waiting for others


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """Names the slots [start, stop) of one chunk: those that a job touches."""

    key: ChunkKey
    chunk_id: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Bounds what a job of this rank may name."""

    num_groups: int
    num_blocks: int
    num_chunks: int
    blocks_per_chunk: int

    def parts(self, job: OffloadJob) -> list[ChunkPart]:
        """Return the parts of the job's chunks, in order; together they hold its blocks in order.

        Raises TransferSpecError, which names the field and both numbers.
        """
        for name, values in (
            ("group_sizes", job.group_sizes),
            ("block_indices", job.block_indices),
        ):
            _check_count(name, len(values), self.num_groups, "the groups of the KV cache")
            if min(values) < 0:
                raise TransferSpecError(f"{name} has {min(values)}, the least is 0")
        size = self.blocks_per_chunk
        spans = [
            (group, max(first - chunk * size, 0), min(first + count - chunk * size, size))
            for group, (count, first) in enumerate(
                zip(job.group_sizes, job.block_indices, strict=True)
            )
            for chunk in range(first // size, -(-(first + count) // size) if count else 0)
        ]
        _check_count("block_ids", len(job.block_ids), sum(job.group_sizes), "group_sizes")
        _check_count("chunk_ids", len(job.chunk_ids), len(spans), "group_sizes and block_indices")
        _check_count("chunk_hashes", len(job.chunk_hashes), len(spans), "chunk_ids")
        _check_ids("block_ids", job.block_ids, self.num_blocks)
        # One pool of chunks serves all groups: no two of them may name the same one.
        _check_ids("chunk_ids", job.chunk_ids, self.num_chunks)
        return [
            ChunkPart(ChunkKey(group, chunk_hash), chunk_id, start, stop)
            for (group, start, stop), chunk_id, chunk_hash in zip(
                spans, job.chunk_ids, job.chunk_hashes, strict=True
            )
        ]


def _check_count(name: str, count: int, expected: int, reason: str) -> None:
    if count != expected:
        raise TransferSpecError(f"{name} has {count} entries, {reason} need {expected}")


def _check_ids(name: str, ids: Sequence[int], limit: int) -> None:
    """Each must be in [0, limit), and none may stand twice."""
    if len(set(ids)) != len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise TransferSpecError(f"{twice} stands {ids.count(twice)} times in {name}")
    if ids and (min(ids) < 0 or max(ids) >= limit):
        wrong = next(each for each in ids if not 0 <= each < limit)
        raise TransferSpecError(f"{wrong} in {name} is not an id: ids are below {limit}")


class JobMerger:
    """Merges the reports of all ranks: a block is moved when every rank has moved its heads."""

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
        failed = {chunk_id for each in reports for chunk_id in each.failed_chunk_ids}
        return JobFinished(
            job_id=report.job_id,
            ok=all(each.ok for each in reports),
            error="; ".join(sorted({each.error for each in reports if each.error})),
            failed_chunk_ids=sorted(failed),
            num_bytes=sum(each.num_bytes for each in reports),
            seconds=max(each.seconds for each in reports),
        )
