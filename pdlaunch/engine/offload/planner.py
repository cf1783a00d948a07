"""The scheduler's side of the host tier: it knows what the host blocks hold, finds prefixes on
device and host together, and plans the jobs that copy blocks. It uses no torch and copies nothing.

``find -> begin_load -> finish`` loads a prefix from the host, ``begin_store -> finish`` stores
computed blocks. In each group, a prefix has a run of device blocks and then a run of host blocks::

    logical block      0   1   2   3   4   5   6
    full group       [ d   d   d   h   h   h ]        shared: 0..2, loaded: 3..5
    sliding group            . [ d   h   h   h ]      blocks that the next token sees
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pdlaunch.engine.kvcache.groups import KVCacheGroup, first_visible, longest_prefix
from pdlaunch.engine.kvcache.manager import BlockTables, FindBlock, PrefixHit, find_run

# A host block holds one KV block of one group. A job owns its device and host blocks until all
# ranks have reported its end.
Direction = Literal["store", "load"]  # ``store``: device to host; ``load``: host to device

DIRECTIONS: tuple[Direction, Direction] = ("store", "load")


class BlockKey(NamedTuple):
    """Identifies the content of a block."""

    group: int
    block_hash: bytes  # covers model, salt and all tokens up to the end of the block


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """Describes one transfer, between ``block_ids[i]`` and ``host_ids[i]``. All ranks get the same
    job, and each copies its own heads.
    """

    job_id: int
    direction: Direction
    block_ids: list[int]  # device blocks
    host_ids: list[int]
    keys: list[BlockKey]  # for each block, its content


@dataclass(frozen=True, slots=True)
class JobFinished:
    """Reports that a job has ended: no copy reads or writes its blocks any more."""

    job_id: int
    # All bytes were copied; after a load, they are proven to equal the stored bytes.
    ok: bool
    error: str = ""
    # Host blocks that did not have the content that the load expected.
    failed_host_ids: list[int] = field(default_factory=list)
    num_bytes: int = 0


Move = tuple[int, int, BlockKey]  # device block, host block, content


@dataclass(slots=True)
class _HostBlock:
    key: BlockKey
    is_resident: bool = False
    pins: int = 0
    is_failed: bool = False


class HostTier:
    """Knows which content each of ``num_blocks`` host blocks holds. If no block is free, the least
    recently used block is evicted.

    ::

        free ── begin_store ──▶ storing ─┬─ finish_store(ok) ──▶ resident ── evict ──▶ free
                                         └─ failed ────────────▶ free
        resident ── begin_load: pins + 1 ──▶ resident ── finish_load: pins - 1
                        a failed block cannot be found, and is free after its last load

    Only resident blocks can be found. Storing and pinned blocks are never evicted, because a copy
    writes or reads them.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        # A stack, low ids on top, so that a new tier touches little memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[int, _HostBlock] = {}
        # All storing and resident blocks except failed blocks, the least recently used first.
        self._by_key: OrderedDict[BlockKey, int] = OrderedDict()
        self.num_evicted_blocks = 0
        # Called with a hash of group 0 and True if it can be found now, False if no longer.
        self.on_change: Callable[[bytes, bool], None] = lambda _, __: None

    @property
    def num_used_blocks(self) -> int:
        return len(self._blocks)

    def find(self, group: int, block_hash: bytes) -> int | None:
        host_id = self._by_key.get(BlockKey(group, block_hash))
        return host_id if host_id is not None and self._blocks[host_id].is_resident else None

    def begin_store(self, key: BlockKey) -> int | None:
        """Return a host block to write to until ``finish_store``; None if the content is there or
        is being stored, or if copies use all blocks.
        """
        if key in self._by_key:
            return None
        if not self._free:
            oldest = next(filter(self._is_idle, self._by_key.values()), None)
            if oldest is None:
                return None  # copies use all blocks
            self._give_up(oldest)
            self.num_evicted_blocks += 1
        host_id = self._by_key[key] = self._free.pop()
        self._blocks[host_id] = _HostBlock(key)
        return host_id

    def finish_store(self, host_id: int, *, ok: bool) -> None:
        """Record the end of a copy: the block can be found, or is free after a failure."""
        block = self._blocks[host_id]
        assert not block.is_resident
        if ok:
            block.is_resident = True
            self._by_key.move_to_end(block.key)
            self._notify(block.key, True)
        else:
            self._give_up(host_id)

    def begin_load(self, host_ids: Sequence[int]) -> None:
        """Pin resident blocks and mark them as used; ``host_ids``: in the order of the prefix."""
        # Mark the beginning last, so that it is evicted after the end, which is useless alone.
        for host_id in reversed(host_ids):
            block = self._blocks[host_id]
            assert block.is_resident
            assert not block.is_failed
            block.pins += 1
            self._by_key.move_to_end(block.key)

    def finish_load(self, host_ids: Iterable[int], failed_host_ids: Iterable[int] = ()) -> None:
        """Unpin the blocks of a load. Failed blocks hold wrong bytes and are dropped."""
        failed = set(failed_host_ids)
        for host_id in host_ids:
            block = self._blocks[host_id]
            assert block.pins > 0
            block.pins -= 1
            if host_id in failed and not block.is_failed:
                del self._by_key[block.key]
                block.is_failed = True
                self._notify(block.key, False)
            # A failed block is free only after its last load.
            if block.is_failed and not block.pins:
                del self._blocks[host_id]
                self._free.append(host_id)

    def check_integrity(self, *, storing: Iterable[int] = (), loading: Iterable[int] = ()) -> None:
        """Check that each host block is free or used, that it has a pin for each load, and that
        each hash leads to its block. The arguments list the host ids of all running jobs, once for
        each job. Raises AssertionError.
        """
        pins = dict.fromkeys(range(self.num_blocks), 0)
        for host_id in loading:
            pins[host_id] += 1
        assert sorted([*self._free, *self._blocks]) == list(range(self.num_blocks)), (
            "a host block is lost, or in two states"
        )
        in_store = [host_id for host_id, block in self._blocks.items() if not block.is_resident]
        assert sorted(in_store) == sorted(storing), "the tier has other storing blocks"
        for host_id, block in self._blocks.items():
            assert block.pins == pins[host_id], "the number of pins is not the number of loads"
            assert block.is_failed or self._by_key[block.key] == host_id
            assert not block.is_failed or block.pins, "a failed block without loads is not free"
        assert len(self._by_key) == sum(not block.is_failed for block in self._blocks.values())

    def _is_idle(self, host_id: int) -> bool:
        block = self._blocks[host_id]
        return block.is_resident and not block.pins

    def _give_up(self, host_id: int) -> None:
        key = self._blocks.pop(host_id).key
        self._free.append(host_id)
        del self._by_key[key]
        self._notify(key, False)

    def _notify(self, key: BlockKey, is_found: bool) -> None:
        if key.group == 0:
            self.on_change(key.block_hash, is_found)


@dataclass(frozen=True, slots=True)
class HostHit:
    """A cached prefix with blocks on the host."""

    device: PrefixHit  # device blocks to share, by group
    host_ids: list[list[int]]  # host blocks to load, by group: logical blocks [device.end, end)
    end: int  # logical index after the last block of each group


class OffloadPlanner:
    """Owns the running jobs and the tier. Not thread-safe."""

    def __init__(self, groups: Sequence[KVCacheGroup], block_size: int, tier: HostTier) -> None:
        self._windows = [group.sliding_window for group in groups]
        self._block_size = block_size
        self.tier = tier
        self._jobs: dict[int, OffloadJob] = {}
        self._next_job_id = 0

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def find(
        self, block_hashes: Sequence[bytes], max_blocks: int, find_on_device: FindBlock
    ) -> HostHit | None:
        """Return the longest prefix of at most ``max_blocks`` blocks on device and host, never
        shorter than on the device alone; None if it has no blocks on the host. They are not pinned:
        call ``begin_load`` at once or not at all.
        """

        def runs(group: int, start: int, limit: int) -> tuple[list[int], list[int]]:
            device = find_run(find_on_device, group, block_hashes[start:limit])
            host = find_run(self.tier.find, group, block_hashes[start + len(device) : limit])
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
        """Make the job that loads the host blocks of ``hit``. ``block_ids``: by group, a device
        block for each of ``hit.host_ids``, which the job owns until ``finish``. The caller shares
        the blocks of ``hit.device``.
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
        """Make the job that stores these computed blocks, except blocks that the tier has already
        or has no room for; None if no blocks remain. The caller shares ``job.block_ids`` once more
        and releases them after ``finish``, so that the blocks keep their content.
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
        """Call it once all ranks have ended a job; the caller owns its device blocks again."""
        job = self._jobs.pop(report.job_id)
        if job.direction == "load":
            self.tier.finish_load(job.host_ids, report.failed_host_ids)
        else:
            for host_id in job.host_ids:
                self.tier.finish_store(host_id, ok=report.ok)
        return job

    def block_ids_in_flight(self, direction: Direction) -> Iterator[int]:
        for job in self._jobs.values():
            if job.direction == direction:
                yield from job.block_ids

    def check_integrity(self) -> None:
        storing, loading = (
            [id_ for job in self._jobs.values() if job.direction == each for id_ in job.host_ids]
            for each in DIRECTIONS
        )
        self.tier.check_integrity(storing=storing, loading=loading)

    def _add(self, direction: Direction, moves: Sequence[Move]) -> OffloadJob:
        block_ids, host_ids, keys = map(list, zip(*moves, strict=True))
        job = OffloadJob(self._next_job_id, direction, block_ids, host_ids, keys)
        self._next_job_id += 1
        self._jobs[job.job_id] = job
        return job
