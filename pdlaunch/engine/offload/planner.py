"""The scheduler's side of the host tier: keeps its record, finds prefixes on device and host
together, and makes the jobs that move blocks. No torch, no copies.

``find -> begin_load -> finish`` brings a prefix back, ``begin_store -> finish`` copies computed
blocks out. Of each group, a prefix is a run of blocks on the device and then a run of blocks on the
host::

    logical block      0   1   2   3   4   5   6
    full group       [ d   d   d   h   h   h ]        shared: 0..2, loaded: 3..5
    sliding group            . [ d   h   h   h ]      only what the next token sees
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pdlaunch.engine.kvcache.groups import KVCacheGroup, first_visible, longest_prefix
from pdlaunch.engine.kvcache.manager import BlockTables, PrefixHit

# A host block holds one KV block of one group. Blocks and host blocks of an offload job belong to
# it from the moment it is made until all ranks have reported it.
Direction = Literal["store", "load"]  # ``store``: device to host; ``load``: host to device

DIRECTIONS: tuple[Direction, Direction] = ("store", "load")


class BlockKey(NamedTuple):
    """Names the content of a block."""

    group: int
    block_hash: bytes  # covers model, salt and all tokens up to the end of the block


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """Describes one transfer, the same for all ranks; each rank moves its own heads of the blocks.

    The three lists are equally long: block i moves between ``block_ids[i]`` and ``host_ids[i]``.
    """

    job_id: int
    direction: Direction
    block_ids: list[int]  # device blocks
    host_ids: list[int]
    keys: list[BlockKey]  # The content of each block: a store writes it, a load expects it


@dataclass(frozen=True, slots=True)
class JobFinished:
    """A job has ended: nothing reads or writes its blocks any more."""

    job_id: int
    # All bytes are where they belong; those of a load are proven to be those that were stored
    ok: bool
    error: str = ""
    # Host blocks whose content was not what this load expected
    failed_host_ids: list[int] = field(default_factory=list)
    num_bytes: int = 0


# (group, block hash) -> id of the block: ``BlockPool.find``, ``HostTier.find``
FindBlock = Callable[[int, bytes], int | None]
Move = tuple[int, int, BlockKey]  # device block, host block, content


@dataclass(slots=True)
class _HostBlock:
    key: BlockKey
    is_resident: bool = False
    pins: int = 0
    is_failed: bool = False


class HostTier:
    """Keeps the record of ``num_blocks`` host blocks, by id from 0 on: which holds what, and which
    leave when room is short, the least recently used first.

    ::

        free ── begin_store ──▶ storing ─┬─ finish_store(ok) ──▶ resident ── evict ──▶ free
                                         └─ failed ────────────▶ free
        resident ── begin_load: pins + 1 ──▶ resident ── finish_load: pins - 1
                        a block that failed is found no more, and free when its last pin is gone

    Only resident blocks are found. Storing and pinned blocks are in flight: a copy reads or writes
    them, so they never leave.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        # A stack, low ids on top: little memory is touched while the tier is young.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[int, _HostBlock] = {}
        self._by_key: OrderedDict[BlockKey, int] = OrderedDict()
        """Storing and resident blocks but for failed ones, the least recently used first."""
        self.num_evicted_blocks = 0
        self.on_change: Callable[[bytes, bool], None] = lambda _, __: None
        """Called with each hash of group 0, and whether a block for it was added or removed."""

    @property
    def num_used_blocks(self) -> int:
        return len(self._blocks)

    def find(self, group: int, block_hash: bytes) -> int | None:
        host_id = self._by_key.get(BlockKey(group, block_hash))
        return host_id if host_id is not None and self._blocks[host_id].is_resident else None

    def begin_store(self, key: BlockKey) -> int | None:
        """Return a host block to write to until ``finish_store``; None when the content is there
        already or being stored, or when there is no room.
        """
        if key in self._by_key:
            return None
        if not self._free:
            oldest = next(filter(self._is_idle, self._by_key.values()), None)
            if oldest is None:
                return None  # everything is in flight
            self._give_up(oldest)
            self.num_evicted_blocks += 1
        host_id = self._by_key[key] = self._free.pop()
        self._blocks[host_id] = _HostBlock(key)
        return host_id

    def finish_store(self, host_id: int, *, ok: bool) -> None:
        """Record that the copy has ended: the block can be found, or is free."""
        block = self._blocks[host_id]
        assert not block.is_resident
        if ok:
            block.is_resident = True
            self._by_key.move_to_end(block.key)
            self._tell(block.key, True)
        else:
            self._give_up(host_id)

    def begin_load(self, host_ids: Sequence[int]) -> None:
        """Pin resident blocks of one prefix, in its order, and count them as used."""
        # The end of a prefix is of no use without its beginning: that counts as used last.
        for host_id in reversed(host_ids):
            block = self._blocks[host_id]
            assert block.is_resident
            assert not block.is_failed
            block.pins += 1
            self._by_key.move_to_end(block.key)

    def finish_load(self, host_ids: Iterable[int], failed_host_ids: Iterable[int] = ()) -> None:
        """Unpin what ``begin_load`` pinned; failed blocks hold wrong bytes and are given up."""
        failed = set(failed_host_ids)
        for host_id in host_ids:
            block = self._blocks[host_id]
            assert block.pins > 0
            block.pins -= 1
            if host_id in failed and not block.is_failed:
                del self._by_key[block.key]
                block.is_failed = True
                self._tell(block.key, False)
            # Other loads may still read what has failed: it is free after the last of them.
            if block.is_failed and not block.pins:
                self._release(host_id)

    def check_integrity(self, *, storing: Iterable[int] = (), loading: Iterable[int] = ()) -> None:
        """Prove that every host block is free or used once, pinned as often as ``loading`` says,
        and found only when resident.

        Given are the ids of all stores and loads in flight, an id once for each load. Raises
        AssertionError.
        """
        pins = dict.fromkeys(range(self.num_blocks), 0)
        for host_id in loading:
            pins[host_id] += 1
        assert sorted([*self._free, *self._blocks]) == list(range(self.num_blocks)), (
            "a host block is lost or twice used"
        )
        in_store = [host_id for host_id, block in self._blocks.items() if not block.is_resident]
        assert sorted(in_store) == sorted(storing), "the stores in flight are not those of the tier"
        for host_id, block in self._blocks.items():
            assert block.pins == pins[host_id], "the pins are not those of the loads"
            assert block.is_failed or self._by_key[block.key] == host_id
            assert not block.is_failed or block.pins, "a failed block that nobody loads is not free"
        assert len(self._by_key) == sum(not block.is_failed for block in self._blocks.values())

    def _is_idle(self, host_id: int) -> bool:
        block = self._blocks[host_id]
        return block.is_resident and not block.pins

    def _give_up(self, host_id: int) -> None:
        key = self._blocks[host_id].key
        del self._by_key[key]
        self._release(host_id)
        self._tell(key, False)

    def _release(self, host_id: int) -> None:
        del self._blocks[host_id]
        self._free.append(host_id)

    def _tell(self, key: BlockKey, is_found: bool) -> None:
        if key.group == 0:
            self.on_change(key.block_hash, is_found)


@dataclass(frozen=True, slots=True)
class HostHit:
    """Describes a prefix that is partly on the host."""

    device: PrefixHit  # cached blocks of each group to share; what follows them comes from the host
    host_ids: list[list[int]]  # host blocks of each group: its logical blocks [device.end, end)
    end: int  # logical index after the last block of each group


class OffloadPlanner:
    """Owns the jobs in flight and the tier. Not safe for more than one thread."""

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
