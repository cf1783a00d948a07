"""The scheduler's side of the host tier finds prefixes on device and host together, and makes the
jobs that move blocks.

``find -> begin_load -> finish`` brings a prefix back, ``begin_stores -> finish`` copies computed
blocks out. Of each group, a prefix is a run of blocks on the device and then a run of blocks on the
host::

    logical block      0   1   2   3   4   5   6
    full group       [ d   d   d   h   h   h ]        shared: 0..2, loaded: 3..5
    sliding group            . [ d   h   h   h ]      only what the next token sees

Before a pull the groups are independent of each other: each may end where it will, the pull brings
the rest.

A host chunk is found by the hash of its last block, so only chunks that a request fills are stored
and found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pdlaunch.engine.kvcache.groups import KVCacheGroup, first_visible, longest_prefix
from pdlaunch.engine.kvcache.manager import BlockTables, PrefixHit
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.spec import Direction
from pdlaunch.engine.offload.tier import HostTier

FindOnDevice = Callable[[int, bytes], int | None]
"""(group, block hash) -> block id: ``BlockPool.find``."""


@dataclass(frozen=True, slots=True)
class HostHit:
    """Describes a prefix that is partly on the host."""

    device: PrefixHit  # cached blocks of each group to share; what follows them comes from the host
    chunk_ids: list[list[int]]  # chunks of each group, with blocks [device.end(group), ends[group])
    ends: list[int]
    """Logical index, for each group, after its last block; all equal, except before a pull."""

    def num_blocks_to_load(self, group: int) -> int:
        """Return the number of device blocks that the group needs for the load."""
        return self.ends[group] - self.device.end(group)


@dataclass(frozen=True, slots=True)
class _Run:
    """Names neighbouring blocks of one group that are stored together."""

    first: int
    block_ids: list[int]
    chunk_ids: list[int]
    hashes: list[bytes]


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
        self._num_jobs = 0

    @property
    def num_jobs(self) -> int:
        """Return the number of jobs in flight."""
        return len(self._jobs)

    # Loads

    def find(
        self, block_hashes: Sequence[bytes], max_blocks: int, find_on_device: FindOnDevice
    ) -> HostHit | None:
        """Return the longest prefix of at most ``max_blocks`` blocks on device and host; None when
        the host adds nothing to it.

        It is never shorter than what the device alone has. Nothing is pinned before ``begin_load``,
        which must follow at once or never.
        """
        length = longest_prefix(
            self._windows,
            self._block_size,
            min(max_blocks, len(block_hashes)),
            lambda group, start, limit: self._end(
                group, block_hashes, start, limit, find_on_device
            ),
        )
        first = self._first_visible(length * self._block_size)
        return self._hit(block_hashes, first, [length] * len(first), find_on_device)

    def find_for_pull(
        self,
        block_hashes: Sequence[bytes],
        max_blocks: int,
        num_computed: int,
        find_on_device: FindOnDevice,
    ) -> HostHit | None:
        """Return the blocks that a pull need not bring: for each group those from the first one
        visible to token ``num_computed`` on, within the first ``max_blocks``.

        Return None when the host adds nothing to what the device has. Nothing is pinned, as by
        ``find``.
        """
        limit = min(max_blocks, len(block_hashes))
        first = self._first_visible(num_computed)
        ends = [
            self._end(group, block_hashes, start, limit, find_on_device)
            for group, start in enumerate(first)
        ]
        return self._hit(block_hashes, first, ends, find_on_device)

    def begin_load(
        self, hit: HostHit, block_ids: Sequence[Sequence[int]], block_hashes: Sequence[bytes]
    ) -> OffloadJob:
        """Load what ``find`` has found on the host. ``block_ids``: by group
        ``hit.num_blocks_to_load(group)`` device blocks.

        The blocks belong to the job until ``finish``; the caller shares those of ``hit.device``
        itself.
        """
        groups = range(len(self._windows))
        assert all(len(block_ids[group]) == hit.num_blocks_to_load(group) for group in groups)
        starts = [hit.device.end(group) for group in groups]
        hashes = [
            self._chunk_hash(block_hashes, chunk)
            for start, end in zip(starts, hit.ends, strict=True)
            for chunk in self._chunk_range(start, end)
        ]
        job = self._add(
            "load",
            block_ids=[block_id for ids in block_ids for block_id in ids],
            group_sizes=[len(ids) for ids in block_ids],
            block_indices=starts,
            chunk_ids=[chunk_id for ids in hit.chunk_ids for chunk_id in ids],
            chunk_hashes=hashes,
        )
        for chunk_ids in hit.chunk_ids:
            self.tier.begin_load(chunk_ids)
        return job

    # Stores

    def begin_stores(
        self, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> list[OffloadJob]:
        """Store the chunks that became full with the logical blocks [start, end), as far as the
        tier does not have them.

        All tokens of these blocks are computed. The blocks of each job must keep content and owner
        until ``finish``: the caller takes one more share of ``job.block_ids``.
        """
        runs = [
            list(self._new_runs(group, tables, block_hashes, start, end))
            for group in range(len(self._windows))
        ]
        num_jobs = max(map(len, runs), default=0)
        return [
            # Job i takes run i of each group that has so many.
            self._store_job([of_group[place : place + 1] for of_group in runs])
            for place in range(num_jobs)
        ]

    # Both

    def finish(self, report: JobFinished) -> OffloadJob | None:
        """Account for a job that all ranks have ended; its blocks are the caller's again. Return
        None when the id is unknown.
        """
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
        """Yield the device blocks of all jobs of a direction; a block that is stored twice comes
        twice.
        """
        for job in self._jobs.values():
            if job.direction == direction:
                yield from job.block_ids

    def check_integrity(self) -> None:
        """Prove that the tier's chunks in flight are those of the jobs. Raises AssertionError."""
        jobs = list(self._jobs.values())
        self.tier.check_integrity(
            storing=[
                chunk_id for job in jobs if job.direction == "store" for chunk_id in job.chunk_ids
            ],
            loading=[
                chunk_id for job in jobs if job.direction == "load" for chunk_id in job.chunk_ids
            ],
        )

    # Finding

    def _end(
        self,
        group: int,
        block_hashes: Sequence[bytes],
        start: int,
        limit: int,
        find_on_device: FindOnDevice,
    ) -> int:
        """Return where the group's run of blocks on the device, and then on the host, ends; at most
        ``limit``.
        """
        index = start
        while index < limit and find_on_device(group, block_hashes[index]) is not None:
            index += 1
        while index < limit and self._find_chunk(group, block_hashes, index) is not None:
            index += 1
        return index

    def _hit(
        self,
        block_hashes: Sequence[bytes],
        first: list[int],
        ends: list[int],
        find_on_device: FindOnDevice,
    ) -> HostHit | None:
        """Return the blocks [first, ends) of each group, which are all there; None when all are on
        the device.
        """
        device = PrefixHit(
            first,
            [
                _until_none(
                    find_on_device(group, block_hash) for block_hash in block_hashes[start:end]
                )
                for group, (start, end) in enumerate(zip(first, ends, strict=True))
            ],
        )
        if all(device.end(group) >= end for group, end in enumerate(ends)):
            return None
        chunk_ids = [
            self._chunks_between(group, block_hashes, device.end(group), end)
            for group, end in enumerate(ends)
        ]
        return HostHit(device, chunk_ids, ends)

    def _first_visible(self, num_computed: int) -> list[int]:
        """Return by group the first block that token ``num_computed`` sees."""
        return [first_visible(window, num_computed, self._block_size) for window in self._windows]

    # Chunks

    def _find_chunk(self, group: int, block_hashes: Sequence[bytes], index: int) -> int | None:
        """Return the chunk that holds logical block ``index``, or None."""
        chunk, slot = divmod(index, self._blocks_per_chunk)
        if (chunk + 1) * self._blocks_per_chunk > len(block_hashes):
            return None
        return self.tier.find(group, self._chunk_hash(block_hashes, chunk), slot)

    def _chunks_between(
        self, group: int, block_hashes: Sequence[bytes], start: int, end: int
    ) -> list[int]:
        found = [
            self._find_chunk(group, block_hashes, max(start, chunk * self._blocks_per_chunk))
            for chunk in self._chunk_range(start, end)
        ]
        assert None not in found
        return [chunk_id for chunk_id in found if chunk_id is not None]

    def _chunk_range(self, start: int, end: int) -> range:
        """Return the chunks with a block of [start, end)."""
        if start >= end:
            return range(0)
        return range(start // self._blocks_per_chunk, (end - 1) // self._blocks_per_chunk + 1)

    def _chunk_hash(self, block_hashes: Sequence[bytes], chunk: int) -> bytes:
        return block_hashes[(chunk + 1) * self._blocks_per_chunk - 1]

    def _new_runs(
        self, group: int, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> Iterator[_Run]:
        size = self._blocks_per_chunk
        run: _Run | None = None
        for chunk in range(start // size, end // size):
            # chunk of 4 slots  [ .  .  b  b ]    blocks before tables.first have left the window:
            #                    first % 4 = 2    the slots before it hold nothing
            first, last = max(tables.first[group], chunk * size), (chunk + 1) * size
            chunk_hash = self._chunk_hash(block_hashes, chunk)
            chunk_id = (
                self.tier.begin_store(group, chunk_hash, first % size) if first < last else None
            )
            # A chunk that is not stored ends the run: the blocks of a run are neighbours.
            if chunk_id is None:
                if run is not None:
                    yield run
                run = None
                continue
            if run is None:
                run = _Run(first, [], [], [])
            run.block_ids.extend(tables.between(group, first, last))
            run.chunk_ids.append(chunk_id)
            run.hashes.append(chunk_hash)
        if run is not None:
            yield run

    def _store_job(self, runs: Sequence[Sequence[_Run]]) -> OffloadJob:
        """Make one job of ``runs``, which has one run or none for each group."""
        flat = [run for of_group in runs for run in of_group]
        return self._add(
            "store",
            block_ids=[block_id for run in flat for block_id in run.block_ids],
            group_sizes=[sum(len(run.block_ids) for run in of_group) for of_group in runs],
            block_indices=[of_group[0].first if of_group else 0 for of_group in runs],
            chunk_ids=[chunk_id for run in flat for chunk_id in run.chunk_ids],
            chunk_hashes=[chunk_hash for run in flat for chunk_hash in run.hashes],
        )

    def _add(
        self,
        direction: Direction,
        *,
        block_ids: list[int],
        group_sizes: list[int],
        block_indices: list[int],
        chunk_ids: list[int],
        chunk_hashes: list[bytes],
    ) -> OffloadJob:
        job = OffloadJob(
            self._num_jobs,
            direction,
            block_ids,
            group_sizes,
            block_indices,
            chunk_ids,
            chunk_hashes,
        )
        self._num_jobs += 1
        self._jobs[job.job_id] = job
        return job


def _until_none(block_ids: Iterable[int | None]) -> list[int]:
    return [
        block_id
        for block_id in takewhile(lambda block_id: block_id is not None, block_ids)
        if block_id is not None
    ]
