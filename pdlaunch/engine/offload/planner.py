"""The scheduler's side of the host tier finds prefixes on device and host together, and makes the
jobs that move blocks.

``find -> begin_load -> finish`` brings a prefix back, ``begin_stores -> finish`` copies computed
blocks out. Of each group, a prefix is a run of blocks on the device and then a run of blocks on the
host::

    logical block      0   1   2   3   4   5   6
    full group       [ d   d   d   h   h   h ]        shared: 0..2, loaded: 3..5
    sliding group            . [ d   h   h   h ]      only what the next token sees

A host chunk is found by the hash of its last block, so only chunks that a request fills are stored
and found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from pdlaunch.engine.kvcache.groups import KVCacheGroup, first_visible, longest_prefix
from pdlaunch.engine.kvcache.manager import BlockTables, PrefixHit
from pdlaunch.engine.offload.jobs import Direction, JobFinished, OffloadJob
from pdlaunch.engine.offload.tier import HostTier

FindOnDevice = Callable[[int, bytes], int | None]
"""(group, block hash) -> block id: ``BlockPool.find``."""


@dataclass(frozen=True, slots=True)
class HostHit:
    """Describes a prefix that is partly on the host."""

    device: PrefixHit  # cached blocks of each group to share; what follows them comes from the host
    chunk_ids: list[list[int]]  # chunks of each group, with blocks [device.end(group), end)
    end: int  # logical index after the last block of each group

    def num_blocks_to_load(self, group: int) -> int:
        """Return the number of device blocks that the group needs for the load."""
        return self.end - self.device.end(group)


@dataclass(frozen=True, slots=True)
class _Span:
    """Holds neighbouring blocks of one group that one job moves, and their chunks."""

    first: int = 0  # logical index of the first block
    block_ids: list[int] = field(default_factory=list)
    chunk_ids: list[int] = field(default_factory=list)
    chunk_hashes: list[bytes] = field(default_factory=list)


class OffloadPlanner:
    """Owns the jobs in flight and the tier. Not safe for more than one thread."""

    def __init__(
        self,
        groups: Sequence[KVCacheGroup],
        block_size: int,
        tier: HostTier,
        *,
        blocks_per_chunk: int = 1,
    ) -> None:
        """``block_size`` in tokens; ``blocks_per_chunk`` as in every rank's worker."""
        self._windows = [group.sliding_window for group in groups]
        self._block_size = block_size
        self.tier = tier
        self._blocks_per_chunk = blocks_per_chunk
        self._jobs: dict[int, OffloadJob] = {}
        self._next_job_id = 0

    @property
    def num_jobs(self) -> int:
        """Return the number of jobs in flight."""
        return len(self._jobs)

    def find(
        self, block_hashes: Sequence[bytes], max_blocks: int, find_on_device: FindOnDevice
    ) -> HostHit | None:
        """Return the longest prefix of at most ``max_blocks`` blocks on device and host; None when
        the host adds nothing to it.

        It is never shorter than what the device alone has. Nothing is pinned before ``begin_load``,
        which must follow at once or never.
        """

        def end_of(group: int, start: int, limit: int) -> int:
            device, chunk_ids = self._run(group, block_hashes, start, limit, find_on_device)
            return start + len(device) + len(chunk_ids)

        limit = min(max_blocks, len(block_hashes))
        length = longest_prefix(self._windows, self._block_size, limit, end_of)
        num_computed = length * self._block_size
        first = [first_visible(window, num_computed, self._block_size) for window in self._windows]
        runs = [
            self._run(group, block_hashes, start, length, find_on_device)
            for group, start in enumerate(first)
        ]
        if not any(chunk_ids for _, chunk_ids in runs):
            return None
        return HostHit(
            device=PrefixHit(first, [device for device, _ in runs]),
            # Neighbouring blocks may share a chunk, which is loaded once.
            chunk_ids=[list(dict.fromkeys(chunk_ids)) for _, chunk_ids in runs],
            end=length,
        )

    def begin_load(
        self, hit: HostHit, block_ids: Sequence[Sequence[int]], block_hashes: Sequence[bytes]
    ) -> OffloadJob:
        """Load what ``find`` has found on the host. ``block_ids``: by group
        ``hit.num_blocks_to_load(group)`` device blocks.

        The blocks belong to the job until ``finish``; the caller shares those of ``hit.device``
        itself.
        """
        spans = []
        for group, (ids, chunk_ids) in enumerate(zip(block_ids, hit.chunk_ids, strict=True)):
            assert len(ids) == hit.num_blocks_to_load(group)
            start = hit.device.end(group)
            chunk = start // self._blocks_per_chunk
            hashes = [self._chunk_hash(block_hashes, chunk + i) for i in range(len(chunk_ids))]
            spans.append(_Span(start, [*ids], chunk_ids, hashes))
            self.tier.begin_load(chunk_ids)
        return self._add("load", spans)

    def begin_stores(
        self, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> list[OffloadJob]:
        """Store the chunks that became full with the logical blocks [start, end), as far as the
        tier does not have them.

        All tokens of these blocks are computed. The blocks of each job must keep content and owner
        until ``finish``: the caller takes one more share of ``job.block_ids``.
        """
        spans = [
            self._new_spans(group, tables, block_hashes, start, end)
            for group in range(len(self._windows))
        ]
        # Job i takes span i of each group that has one.
        return [
            self._add("store", [span or _Span() for span in of_job])
            for of_job in zip_longest(*spans)
        ]

    def finish(self, report: JobFinished) -> OffloadJob | None:
        """Account for a job that all ranks have ended; its blocks are the caller's again."""
        job = self._jobs.pop(report.job_id, None)
        if job is None:
            return None
        if job.direction == "load":
            self.tier.finish_load(job.chunk_ids, report.failed_chunk_ids)
        else:
            for chunk_id in job.chunk_ids:
                self.tier.finish_store(chunk_id, ok=report.ok)
        return job

    def block_ids_in_flight(self, direction: Direction) -> Iterator[int]:
        """Yield the device blocks of all jobs of a direction, one that is stored twice twice."""
        for job in self._jobs.values():
            if job.direction == direction:
                yield from job.block_ids

    def check_integrity(self) -> None:
        """Prove that the tier's chunks in flight are those of the jobs. Raises AssertionError."""
        in_flight: dict[Direction, list[int]] = {"store": [], "load": []}
        for job in self._jobs.values():
            in_flight[job.direction] += job.chunk_ids
        self.tier.check_integrity(storing=in_flight["store"], loading=in_flight["load"])

    def _run(
        self,
        group: int,
        block_hashes: Sequence[bytes],
        start: int,
        limit: int,
        find_on_device: FindOnDevice,
    ) -> tuple[list[int], list[int]]:
        """Return the group's run of blocks on the device from ``start`` on, and then the chunk of
        each block on the host, up to ``limit``.
        """
        device: list[int] = []
        for index in range(start, limit):
            block_id = find_on_device(group, block_hashes[index])
            if block_id is None:
                break
            device.append(block_id)
        chunk_ids: list[int] = []
        for index in range(start + len(device), limit):
            chunk, slot = divmod(index, self._blocks_per_chunk)
            if (chunk + 1) * self._blocks_per_chunk > len(block_hashes):
                break  # the request does not fill it
            chunk_id = self.tier.find(group, self._chunk_hash(block_hashes, chunk), slot)
            if chunk_id is None:
                break
            chunk_ids.append(chunk_id)
        return device, chunk_ids

    def _new_spans(
        self, group: int, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> list[_Span]:
        """Take chunks of the tier for full chunks that it lacks."""
        size = self._blocks_per_chunk
        spans: list[_Span] = []
        is_neighbour = False
        for chunk in range(start // size, end // size):
            # chunk of 4 slots  [ .  .  b  b ]    blocks before tables.first have left the window:
            #                    first % 4 = 2    the slots before it hold nothing
            first, last = max(tables.first[group], chunk * size), (chunk + 1) * size
            chunk_hash = self._chunk_hash(block_hashes, chunk)
            chunk_id = (
                self.tier.begin_store(group, chunk_hash, first % size) if first < last else None
            )
            if chunk_id is not None:
                # A chunk that is not stored ends a span: the blocks of a span are neighbours.
                if not is_neighbour:
                    spans.append(_Span(first))
                spans[-1].block_ids.extend(tables.between(group, first, last))
                spans[-1].chunk_ids.append(chunk_id)
                spans[-1].chunk_hashes.append(chunk_hash)
            is_neighbour = chunk_id is not None
        return spans

    def _chunk_hash(self, block_hashes: Sequence[bytes], chunk: int) -> bytes:
        return block_hashes[(chunk + 1) * self._blocks_per_chunk - 1]

    def _add(self, direction: Direction, spans: Sequence[_Span]) -> OffloadJob:
        """Make a job of one span for each group."""
        job = OffloadJob(
            self._next_job_id,
            direction,
            block_ids=[block_id for span in spans for block_id in span.block_ids],
            group_sizes=[len(span.block_ids) for span in spans],
            block_indices=[span.first for span in spans],
            chunk_ids=[chunk_id for span in spans for chunk_id in span.chunk_ids],
            chunk_hashes=[chunk_hash for span in spans for chunk_hash in span.chunk_hashes],
        )
        self._next_job_id += 1
        self._jobs[job.job_id] = job
        return job
