"""Manages an engine's KV blocks: block tables for all groups from one pool, and a prefix cache.

The query at token q sees all tokens up to q in a full group, and tokens [q - window + 1, q] in a
sliding group. A request that has computed ``num_computed`` tokens next queries at num_computed and
never at an earlier token, so blocks wholly before that window are released.

The pool has a method for each transition between states of a block::

    free ──┬─ allocate ────────▶ owned ── release by the last owner ──▶ cached, or free
    cached ┤                     │  ▲ ▲
           │         share: one more owner (also cached ▶ owned)
           │                     register: can be found by its hash, and cached after its release
           └─ allocate_for_pull ─▶ pulling ─┬─ finish_pull ─▶ owned
                                            ├─ drop_pull ───▶ free
                                            └─ quarantine ──▶ quarantined ─ drain ─▶ free

Owners are requests, leases, and copies of a block to host memory. Pulling means that a transfer
writes to the block, from another engine or from host memory.

Cached blocks are free blocks that can still be found by their hash. The least recently used block
is reused first. Owners keep the ids of their blocks and release each block exactly once.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pdlaunch.engine.kvcache.groups import (
    KVCacheGroup,
    first_visible,
    longest_prefix,
    min_blocks,
    span_blocks,
)

FindBlock = Callable[[int, bytes], int | None]  # (group, block hash) -> block id


class BlockPool:
    """Holds the state, owner count and hash of each block, 0 <= block id < num_blocks."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        # A stack, low ids on top, so that a new engine touches few pages of its cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._pulling: set[int] = set()
        self._quarantined: set[int] = set()
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._by_hash: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # Called with a hash of group 0 and True if it can be found now, False if no longer.
        self.on_change: Callable[[bytes, bool], None] = lambda _, __: None

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_quarantined_blocks(self) -> int:
        return len(self._quarantined)

    def num_owners(self, block_id: int) -> int:
        return self._num_owners[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for one owner. The caller has checked ``num_free_blocks``."""
        block_ids = self._take(num_blocks)
        for block_id in block_ids:
            self._num_owners[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if not self._num_owners[block_id]:
                del self._cached[block_id]
            self._num_owners[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Remove one owner of each block. If blocks become cached, the first is reused first."""
        for block_id in block_ids:
            assert self._num_owners[block_id] > 0
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id]:
                continue
            if self._keys[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def allocate_for_pull(self, num_blocks: int) -> list[int]:
        block_ids = self._take(num_blocks)
        self._pulling.update(block_ids)
        return block_ids

    def finish_pull(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._pulling.remove(block_id)
            self._num_owners[block_id] = 1

    def drop_pull(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            # Free, not cached: a failed transfer has left unknown bytes in it.
            self._pulling.remove(block_id)
            self._free.append(block_id)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._pulling.remove(block_id)
            self._quarantined.add(block_id)

    def drain(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def register(self, block_id: int, group: int, block_hash: bytes) -> None:
        """Let an owned block be found by its hash, unless another block already has that hash."""
        assert self._num_owners[block_id] > 0
        # Two requests may have computed the same block at the same time. One copy is enough.
        by_hash = self._by_hash[group]
        if self._keys[block_id] is None and block_hash not in by_hash:
            by_hash[block_hash] = block_id
            self._keys[block_id] = (group, block_hash)
            if group == 0:
                self.on_change(block_hash, True)

    def find(self, group: int, block_hash: bytes) -> int | None:
        return self._by_hash[group].get(block_hash)

    def forget_cached(self) -> None:
        """Forget all hashes, because the memory has lost its content. No hashed block is owned."""
        while self._cached:
            self._free.append(self._take_cached())
        assert not any(self._by_hash)

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """Count the blocks that ``share`` would take from the free blocks."""
        return sum(block_id in self._cached for block_id in block_ids)

    def check_integrity(
        self,
        *,
        owned: Iterable[int] = (),
        pulling: Iterable[int] = (),
        quarantined: Iterable[int] = (),
    ) -> None:
        """Check that each block is in one state and that each hash leads to its block. The
        arguments list the blocks of all owners and transfers, once for each. Raises AssertionError.
        """
        num_owners = [0] * self.num_blocks
        for block_id in owned:
            num_owners[block_id] += 1
        assert num_owners == self._num_owners, "the pool has other owned blocks"
        assert sorted(pulling) == sorted(self._pulling), "the pool has other pulling blocks"
        assert sorted(quarantined) == sorted(self._quarantined), (
            "the pool has other quarantined blocks"
        )
        in_use = [block_id for block_id, number in enumerate(num_owners) if number]
        places = [*self._free, *self._cached, *in_use, *self._pulling, *self._quarantined]
        assert sorted(places) == list(range(self.num_blocks)), "a block is lost or in two states"
        for block_id, key in enumerate(self._keys):
            if key is None:
                assert block_id not in self._cached
            else:
                assert self._by_hash[key[0]][key[1]] == block_id
                assert block_id in self._cached or num_owners[block_id], (
                    "a block with a hash is neither cached nor owned"
                )
        assert sum(map(len, self._by_hash)) == sum(key is not None for key in self._keys)

    def _take(self, num_blocks: int) -> list[int]:
        assert num_blocks <= self.num_free_blocks
        # Take free blocks first, then the least recently used cached blocks.
        num_fresh = min(num_blocks, len(self._free))
        return [self._free.pop() for _ in range(num_fresh)] + [
            self._take_cached() for _ in range(num_blocks - num_fresh)
        ]

    def _take_cached(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        key = self._keys[block_id]
        assert key is not None
        del self._by_hash[key[0]][key[1]]
        self._keys[block_id] = None
        if key[0] == 0:
            self.on_change(key[1], False)
        return block_id


class BlockTables:
    """The block tables of one request: for each group, which block holds which tokens.

    Logical block i of a group holds tokens [i * block_size, (i + 1) * block_size). All groups end
    at the same logical block. A sliding group may begin later, because blocks before its window are
    released::

        logical block    0   1   2   3   4
        full group     [ a   b   c   d   e ]     first 0, end 5
        sliding group          [ v   w   x ]     first 2, end 5
    """

    __slots__ = ("block_ids", "end", "first", "next_release")

    def __init__(self, num_groups: int) -> None:
        self.first = [0] * num_groups  # logical index of the first block, by group
        self.end = 0  # logical index after the last block of each group
        # The blocks [first, end), by group.
        self.block_ids: list[list[int]] = [[] for _ in range(num_groups)]
        self.next_release = 0  # number of computed tokens at which another block leaves its window

    def append(self, first: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        """Append blocks at logical index ``first[group]``; an empty group may begin anywhere."""
        for group, new_ids in enumerate(block_ids):
            held = self.block_ids[group]
            if not held:
                self.first[group] = first[group]
            assert self.first[group] + len(held) == first[group]
            held.extend(new_ids)
        self.end = self.first[0] + len(self.block_ids[0])
        assert all(
            start + len(held) == self.end
            for start, held in zip(self.first, self.block_ids, strict=True)
        )

    def between(self, group: int, start: int, end: int) -> list[int]:
        first = self.first[group]
        return self.block_ids[group][max(0, start - first) : max(0, end - first)]

    def pop_before(self, group: int, index: int) -> list[int]:
        count = max(0, index - self.first[group])
        popped = self.block_ids[group][:count]
        del self.block_ids[group][:count]
        self.first[group] += len(popped)
        return popped


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Blocks in the prefix cache that a request can share."""

    first: list[int]  # logical index of the first block, by group
    block_ids: list[list[int]]  # the blocks from ``first`` on, by group

    def end(self, group: int) -> int:
        return self.first[group] + len(self.block_ids[group])


class KVCacheManager:
    """Finds, allocates and releases blocks for requests. Block counts include all groups."""

    def __init__(self, groups: Sequence[KVCacheGroup], num_blocks: int, block_size: int) -> None:
        self._windows = [group.sliding_window for group in groups]
        self.num_groups = len(groups)
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self.num_groups)

    def new_tables(self) -> BlockTables:
        tables = BlockTables(self.num_groups)
        self._plan_release(tables)
        return tables

    def num_logical_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def min_blocks(self, num_tokens: int) -> int:
        return min_blocks(self._windows, self.block_size, num_tokens)

    # Prefix cache

    def find_prefix(self, block_hashes: Sequence[bytes], max_blocks: int) -> PrefixHit:
        """Return the longest cached prefix of at most ``max_blocks`` logical blocks."""

        def end_of(group: int, start: int, limit: int) -> int:
            return start + len(find_run(self.pool.find, group, block_hashes[start:limit]))

        length = longest_prefix(self._windows, self.block_size, max_blocks, end_of)
        return self.find_for_pull(block_hashes, length, length * self.block_size)

    def find_for_pull(
        self, block_hashes: Sequence[bytes], max_blocks: int, num_computed: int
    ) -> PrefixHit:
        """Return for each group the cached blocks that a pull can leave out: from the first block
        that token ``num_computed`` sees, up to the first gap.
        """
        # The gaps may differ between groups, because the pull transfers the missing blocks.
        first = self._first_visible(num_computed)
        found = [
            find_run(self.pool.find, group, block_hashes[start:max_blocks])
            for group, start in enumerate(first)
        ]
        return PrefixHit(first, found)

    def share(self, tables: BlockTables, hit: PrefixHit) -> None:
        self.share_hit(hit)
        tables.append(hit.first, hit.block_ids)
        self._plan_release(tables)

    def share_hit(self, hit: PrefixHit) -> None:
        for block_ids in hit.block_ids:
            self.pool.share(block_ids)

    def release_hit(self, hit: PrefixHit) -> None:
        for block_ids in hit.block_ids:
            self.pool.release(reversed(block_ids))

    def adopt_pulled(
        self, tables: BlockTables, hit: PrefixHit, pulled: Sequence[Sequence[int]]
    ) -> None:
        for block_ids in pulled:
            self.pool.finish_pull(block_ids)
        tables.append(
            hit.first, [[*held, *new] for held, new in zip(hit.block_ids, pulled, strict=True)]
        )
        self._plan_release(tables)

    def register(
        self, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> None:
        for group in range(self.num_groups):
            begin = max(start, tables.first[group])
            for index, block_id in enumerate(tables.between(group, begin, end), begin):
                self.pool.register(block_id, group, block_hashes[index])

    # Block tables

    def has_room_for(self, hit: PrefixHit, num_tokens: int, num_reserved: int) -> bool:
        """Return True if a request that begins with ``hit`` can compute ``num_tokens`` tokens, and
        leave ``num_reserved`` blocks free. Sharing a cached block takes it from the free blocks;
        sharing an owned block does not.
        """
        num_logical = self.num_logical_blocks(num_tokens)
        num_needed = 0
        for group, window in enumerate(self._windows):
            num_cached = self.pool.num_cached_among(hit.block_ids[group])
            num_taken = num_cached + num_logical - hit.end(group)
            # A sliding group releases blocks that leave its window, so it never needs more. Shared
            # blocks with other owners do not become free then, so they do not lower the number.
            if window is not None:
                num_taken = min(num_taken, span_blocks(window, self.block_size))
            num_needed += num_taken
        return num_needed + num_reserved <= self.pool.num_free_blocks

    def max_tokens(self, tables: BlockTables) -> int:
        return (tables.end + self.pool.num_free_blocks // self.num_groups) * self.block_size

    def extend(self, tables: BlockTables, num_tokens: int) -> bool:
        """Allocate blocks for ``num_tokens`` tokens. Return False if too few blocks are free."""
        count = self.num_logical_blocks(num_tokens) - tables.end
        if count <= 0:
            return True
        if count * self.num_groups > self.pool.num_free_blocks:
            return False
        block_ids = self.pool.allocate(count * self.num_groups)
        # The first ``count`` ids are for group 0, the next for group 1, and so on.
        new_ids = [block_ids[start : start + count] for start in range(0, len(block_ids), count)]
        tables.append([tables.end] * self.num_groups, new_ids)
        return True

    def release_left(self, tables: BlockTables, num_computed: int) -> None:
        """Release the blocks that no query from token ``num_computed`` on can see."""
        if num_computed < tables.next_release:
            return
        for group, first in enumerate(self._first_visible(num_computed)):
            self.pool.release(tables.pop_before(group, first))
        self._plan_release(tables)

    def free(self, tables: BlockTables) -> None:
        """Release all blocks, the last first, so that the end of a prefix is reused first."""
        for block_ids in tables.block_ids:
            self.pool.release(reversed(block_ids))
            block_ids.clear()
        tables.first = [0] * self.num_groups
        tables.end = 0
        self._plan_release(tables)

    def lease(self, tables: BlockTables, num_tokens: int) -> PrefixHit:
        """Lease the blocks of a finished request's first ``num_tokens`` tokens, in sliding groups
        the window of the last of these tokens, which a reader without the next token computes
        again; free the others.
        """
        end = self.num_logical_blocks(num_tokens)
        first = self._first_visible(num_tokens - 1)
        leased = PrefixHit(
            first, [tables.between(group, start, end) for group, start in enumerate(first)]
        )
        assert all(leased.end(group) == end for group in range(self.num_groups))
        # tables.first ....... first ............ end .......... tables.end
        #    left the window   │      leased      │  output only  │
        self.share_hit(leased)
        self.free(tables)
        return leased

    def _first_visible(self, num_computed: int) -> list[int]:
        return [first_visible(window, num_computed, self.block_size) for window in self._windows]

    def _plan_release(self, tables: BlockTables) -> None:
        tables.next_release = min(
            (
                # Block ``first`` leaves when the window's first token, num_computed - window + 1,
                # is the first token of the next block, (first + 1) * block_size.
                (tables.first[group] + 1) * self.block_size + window - 1
                for group, window in enumerate(self._windows)
                if window is not None
            ),
            default=sys.maxsize,
        )


def find_run(find: FindBlock, group: int, block_hashes: Sequence[bytes]) -> list[int]:
    """Return the ids of the blocks before the first gap."""
    found: list[int] = []
    for block_hash in block_hashes:
        block_id = find(group, block_hash)
        if block_id is None:
            break
        found.append(block_id)
    return found
