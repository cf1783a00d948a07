"""The scheduler's side of the host tier finds prefixes on device and host together, and makes the
jobs that move blocks.

``find -> begin_load -> finish`` brings a prefix back, ``begin_store -> finish`` copies computed
blocks out. Of each group, a prefix is a run of blocks on the device and then a run of blocks on the
host::

    logical block      0   1   2   3   4   5   6
    full group       [ d   d   d   h   h   h ]        shared: 0..2, loaded: 3..5
    sliding group            . [ d   h   h   h ]      only what the next token sees
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdlaunch.engine.kvcache.groups import KVCacheGroup, first_visible, longest_prefix
from pdlaunch.engine.kvcache.manager import BlockTables, PrefixHit
from pdlaunch.engine.offload.jobs import BlockKey, Direction, JobFinished, OffloadJob
from pdlaunch.engine.offload.tier import HostTier

FindBlock = Callable[[int, bytes], int | None]
"""(group, block hash) -> id of the block: ``BlockPool.find``, ``HostTier.find``."""
Move = tuple[int, int, BlockKey]  # device block, host block, content


@dataclass(frozen=True, slots=True)
class HostHit:
    """Describes a prefix that is partly on the host."""

    device: PrefixHit  # cached blocks of each group to share; what follows them comes from the host
    host_ids: list[list[int]]  # host blocks of each group: its logical blocks [device.end, end)
    end: int  # logical index after the last block of each group


class OffloadPlanner:
    """Owns the jobs in flight and the tier. Not safe for more than one thread."""

    def __init__(self, groups: Sequence[KVCacheGroup], block_size: int, tier: HostTier) -> None:
        """``block_size``: in tokens."""
        self._windows = [group.sliding_window for group in groups]
        self._block_size = block_size
        self.tier = tier
        self._jobs: dict[int, OffloadJob] = {}
        self._next_job_id = 0

    @property
    def num_jobs(self) -> int:
        """Return the number of jobs in flight."""
        return len(self._jobs)

    def find(
        self, block_hashes: Sequence[bytes], max_blocks: int, find_on_device: FindBlock
    ) -> HostHit | None:
        """Return the longest prefix of at most ``max_blocks`` blocks on device and host; None when
        the host adds nothing to it.

        It is never shorter than what the device alone has. Nothing is pinned before ``begin_load``,
        which must follow at once or never.
        """

        def runs(group: int, start: int, limit: int) -> tuple[list[int], list[int]]:
            device = _run(find_on_device, group, block_hashes[start:limit])
            host = _run(self.tier.find, group, block_hashes[start + len(device) : limit])
            return device, host

        def end_of(group: int, start: int, limit: int) -> int:
            device, host = runs(group, start, limit)
            return start + len(device) + len(host)

        limit = min(max_blocks, len(block_hashes))
        length = longest_prefix(self._windows, self._block_size, limit, end_of)
        num_computed = length * self._block_size
        first = [first_visible(window, num_computed, self._block_size) for window in self._windows]
        found = [runs(group, start, length) for group, start in enumerate(first)]
        if not any(host for _, host in found):
            return None
        device = PrefixHit(first, [device for device, _ in found])
        return HostHit(device, [host for _, host in found], length)

    def begin_load(
        self, hit: HostHit, block_ids: Sequence[Sequence[int]], block_hashes: Sequence[bytes]
    ) -> OffloadJob:
        """Load what ``find`` has found on the host. ``block_ids``: by group a device block for each
        of ``hit.host_ids``.

        The blocks belong to the job until ``finish``; the caller shares those of ``hit.device``
        itself.
        """
        moves: list[Move] = []
        for group, (ids, host_ids) in enumerate(zip(block_ids, hit.host_ids, strict=True)):
            hashes = block_hashes[hit.device.end(group) : hit.end]
            keys = [BlockKey(group, block_hash) for block_hash in hashes]
            moves += zip(ids, host_ids, keys, strict=True)
            self.tier.begin_load(host_ids)
        return self._add("load", moves)

    def begin_store(
        self, tables: BlockTables, block_hashes: Sequence[bytes], blocks: range
    ) -> OffloadJob | None:
        """Store these logical blocks as far as the tier lacks them and has room; None: nothing.

        All tokens of these blocks are computed. They must keep content and owner until ``finish``:
        the caller takes one more share of ``job.block_ids``.
        """
        moves: list[Move] = []
        for group, first in enumerate(tables.first):
            start = max(blocks.start, first)
            for index, block_id in enumerate(tables.between(group, start, blocks.stop), start):
                key = BlockKey(group, block_hashes[index])
                host_id = self.tier.begin_store(key)
                if host_id is not None:
                    moves.append((block_id, host_id, key))
        return self._add("store", moves) if moves else None

    def finish(self, report: JobFinished) -> OffloadJob:
        """Account for a job that all ranks have ended; its blocks are the caller's again."""
        job = self._jobs.pop(report.job_id)
        if job.direction == "load":
            self.tier.finish_load(job.host_ids, report.failed_host_ids)
        else:
            for host_id in job.host_ids:
                self.tier.finish_store(host_id, ok=report.ok)
        return job

    def block_ids_in_flight(self, direction: Direction) -> Iterator[int]:
        """Yield the device blocks of all jobs of a direction, one that is stored twice twice."""
        for job in self._jobs.values():
            if job.direction == direction:
                yield from job.block_ids

    def check_integrity(self) -> None:
        """Prove that the tier's blocks in flight are those of the jobs. Raises AssertionError."""
        in_flight: dict[Direction, list[int]] = {"store": [], "load": []}
        for job in self._jobs.values():
            in_flight[job.direction] += job.host_ids
        self.tier.check_integrity(storing=in_flight["store"], loading=in_flight["load"])

    def _add(self, direction: Direction, moves: Sequence[Move]) -> OffloadJob:
        block_ids, host_ids, keys = map(list, zip(*moves, strict=True))
        job = OffloadJob(self._next_job_id, direction, block_ids, host_ids, keys)
        self._next_job_id += 1
        self._jobs[job.job_id] = job
        return job


def _run(find: FindBlock, group: int, block_hashes: Sequence[bytes]) -> list[int]:
    """Return the ids of the blocks that are found before the first that is not."""
    found: list[int] = []
    for block_hash in block_hashes:
        block_id = find(group, block_hash)
        if block_id is None:
            break
        found.append(block_id)
    return found
