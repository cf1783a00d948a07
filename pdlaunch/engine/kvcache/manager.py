"""Manages the KV cache of an engine: block tables of all groups from one pool, with a prefix cache.

A query at token q sees all tokens up to q in a full group, tokens [q - window + 1, q] in a sliding
one. A request that has computed ``num_computed`` tokens asks next for q = num_computed, and never
again for an earlier one: blocks wholly before that window are given back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.engine.kvcache.block_pool import BlockPool
from pdlaunch.engine.kvcache.block_table import BlockTables
from pdlaunch.engine.kvcache.groups import KVCacheGroup, min_blocks, span_blocks


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Names cached blocks that a request can share."""

    first: list[int]
    """Logical index of the first block, by group."""
    block_ids: list[list[int]]
    """The blocks from there on, by group."""

    def end(self, group: int) -> int:
        """Return the logical index after the group's last block."""
        return self.first[group] + len(self.block_ids[group])


class KVCacheManager:
    """Finds, gives and takes back the blocks of requests.

    Sizes in blocks count all groups unless said otherwise.
    """

    def __init__(self, groups: Sequence[KVCacheGroup], num_blocks: int, block_size: int) -> None:
        self._windows = [group.sliding_window for group in groups]
        self._num_groups = len(groups)
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self._num_groups)

    def new_tables(self) -> BlockTables:
        tables = BlockTables(self._num_groups)
        self._plan_release(tables)
        return tables

    def num_logical_blocks(self, num_tokens: int) -> int:
        """Return how many blocks of one full group hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    @property
    def num_groups(self) -> int:
        return self._num_groups

    def first_visible(self, num_computed: int) -> list[int]:
        """Return by group the first logical block that tokens from ``num_computed`` on see."""
        return [self._first_visible(window, num_computed) for window in self._windows]

    def min_blocks(self, num_tokens: int) -> int:
        """Return how many blocks ``num_tokens`` tokens need, even if they are computed one at a
        time.
        """
        return min_blocks(self._windows, self.block_size, num_tokens)

    def find_prefix(self, block_hashes: Sequence[bytes], max_blocks: int) -> PrefixHit:
        """Return the longest cached prefix from which a request can compute on.

        It has at most ``max_blocks`` logical blocks. Every full group has all its blocks, every
        sliding group those that the first token after the prefix sees.
        """
        length = max_blocks
        for group, window in enumerate(self._windows):
            if window is None:
                length = self._count_cached(group, block_hashes, 0, length)
        # A shorter prefix moves every window towards the beginning, where other blocks have to be
        # cached: repeat until no sliding group shortens it any more.
        settled = False
        while not settled:
            shorter = length
            for group, window in enumerate(self._windows):
                if window is not None:
                    shorter = self._fit_window(group, window, block_hashes, shorter)
            settled, length = shorter == length, shorter
        first = self.first_visible(length * self.block_size)
        return PrefixHit(
            first,
            [
                self._find_all(group, block_hashes[start:length])
                for group, start in enumerate(first)
            ],
        )

    def find_for_pull(
        self, block_hashes: Sequence[bytes], max_blocks: int, num_computed: int
    ) -> PrefixHit:
        """Return what a pull need not bring.

        These are, by group, the cached blocks from the first one on that token ``num_computed``
        sees. Groups are independent of each other here, as no token before ``num_computed`` is
        computed.
        """
        first = self.first_visible(num_computed)
        block_ids = []
        for group, start in enumerate(first):
            end = self._count_cached(group, block_hashes, start, max_blocks)
            block_ids.append(self._find_all(group, block_hashes[start:end]))
        return PrefixHit(first, block_ids)

    def has_room_for(self, hit: PrefixHit, num_tokens: int, num_reserved: int) -> bool:
        """Return whether a request that begins with ``hit`` can compute ``num_tokens`` tokens.

        ``num_reserved`` blocks stay untouched. Sharing takes cached blocks from the free ones.
        Those of a sliding group come back when they leave the window, but blocks shared with other
        owners do not: only what is taken from the free ones counts.
        """
        num_logical = self.num_logical_blocks(num_tokens)
        num_needed = 0
        for group, window in enumerate(self._windows):
            num_taken = (
                self.pool.num_cached_among(hit.block_ids[group]) + num_logical - hit.end(group)
            )
            # A sliding group never holds more than its window spans: it gives back what leaves.
            num_needed += num_taken if window is None else min(num_taken, self._span(window))
        return num_needed + num_reserved <= self.pool.num_free_blocks

    def share(self, tables: BlockTables, hit: PrefixHit) -> None:
        """Begin empty ``tables`` with a hit of equal ends."""
        for block_ids in hit.block_ids:
            self.pool.share(block_ids)
        tables.append(hit.first, hit.block_ids)
        self._plan_release(tables)

    def max_tokens(self, tables: BlockTables, num_takeable_blocks: int) -> int:
        """Return for how many tokens ``tables`` would have room with so many more blocks."""
        return (tables.end + num_takeable_blocks // self._num_groups) * self.block_size

    def extend(self, tables: BlockTables, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in all groups.

        False, and nothing has changed, when blocks are short.
        """
        count = self.num_logical_blocks(num_tokens) - tables.end
        if count <= 0:
            return True
        if count * self._num_groups > self.pool.num_free_blocks:
            return False
        block_ids = self.pool.allocate(count * self._num_groups)
        # The first ``count`` ids are for group 0, the next for group 1, and so on.
        new_ids = [block_ids[start : start + count] for start in range(0, len(block_ids), count)]
        tables.append([tables.end] * self._num_groups, new_ids)
        return True

    def release_left(self, tables: BlockTables, num_computed: int) -> None:
        """Free the blocks that no query from token ``num_computed`` on can see."""
        if num_computed < tables.next_release:
            return
        for group, window in enumerate(self._windows):
            if window is not None:
                self.pool.release(
                    tables.pop_before(group, self._first_visible(window, num_computed))
                )
        self._plan_release(tables)

    def adopt_pulled(
        self, tables: BlockTables, hit: PrefixHit, pulled: Sequence[Sequence[int]]
    ) -> None:
        """Fill empty ``tables`` with shared blocks and the blocks of a pull that has succeeded."""
        for block_ids in pulled:
            self.pool.finish_pull(block_ids)
        tables.append(
            hit.first, [[*held, *new] for held, new in zip(hit.block_ids, pulled, strict=True)]
        )
        self._plan_release(tables)

    def register(
        self, tables: BlockTables, block_hashes: Sequence[bytes], start: int, end: int
    ) -> None:
        """Let others find the logical blocks [start, end), whose tokens are all computed."""
        for group in range(self._num_groups):
            begin = max(start, tables.first[group])
            for index, block_id in enumerate(tables.between(group, begin, end), begin):
                self.pool.register(block_id, group, block_hashes[index])

    def free(self, tables: BlockTables) -> None:
        """Take all blocks back; the tail of the chain is reused before its head."""
        for block_ids in tables.block_ids:
            self.pool.release(reversed(block_ids))
            block_ids.clear()
        tables.first = [0] * self._num_groups
        tables.end = 0
        self._plan_release(tables)

    def lease(self, tables: BlockTables, num_tokens: int) -> PrefixHit:
        """Turn a finished request's blocks into a lease on its first ``num_tokens`` tokens.

        Leased is what the last of these tokens sees, because a reader without the next token
        computes that one again. Other blocks are freed.
        """
        end = self.num_logical_blocks(num_tokens)
        first = self.first_visible(num_tokens - 1)
        leased = [tables.between(group, start, end) for group, start in enumerate(first)]
        assert all(
            len(block_ids) == end - start for block_ids, start in zip(leased, first, strict=True)
        )
        # tables.first ....... first ............ end .......... tables.end
        #    left the window   │   under lease    │  output only  │
        #         released     │                  │   released    │
        for group, block_ids in enumerate(leased):
            self.pool.release(tables.between(group, end, tables.end))
            self.pool.lease(block_ids)
            self.pool.release(tables.between(group, tables.first[group], first[group]))
            tables.block_ids[group].clear()
        self.free(tables)
        return PrefixHit(first, leased)

    def _first_visible(self, window: int | None, num_computed: int) -> int:
        # The query at num_computed sees tokens [num_computed - window + 1, num_computed].
        return 0 if window is None else max(0, num_computed - window + 1) // self.block_size

    def _span(self, window: int) -> int:
        """Return the largest number of blocks that ``window`` neighbouring tokens touch."""
        return span_blocks(window, self.block_size)

    def _plan_release(self, tables: BlockTables) -> None:
        """Note when the next block leaves: its group's window then begins after it."""
        tables.next_release = min(
            (
                # Block ``first`` is left when the first token in sight, num_computed - window + 1,
                # is that of the next block: (first + 1) * block_size.
                (tables.first[group] + 1) * self.block_size + window - 1
                for group, window in enumerate(self._windows)
                if window is not None
            ),
            default=sys.maxsize,
        )

    def _count_cached(self, group: int, block_hashes: Sequence[bytes], start: int, end: int) -> int:
        """Return the logical index of the first block from ``start`` on that is not cached.

        At most ``end``.
        """
        for index in range(start, end):
            if self.pool.find(group, block_hashes[index]) is None:
                return index
        return max(start, end)

    def _fit_window(
        self, group: int, window: int, block_hashes: Sequence[bytes], length: int
    ) -> int:
        """Return the longest prefix of which a sliding group has all visible blocks cached.

        At most ``length`` blocks.
        """
        # Walk back from the end. Where a block lacks, a prefix can at most end there, and its
        # window begins earlier: so the walk goes on from that block.
        index = length
        while index > self._first_visible(window, length * self.block_size):
            index -= 1
            if self.pool.find(group, block_hashes[index]) is None:
                length = index
        return length

    def _find_all(self, group: int, block_hashes: Sequence[bytes]) -> list[int]:
        found = [self.pool.find(group, block_hash) for block_hash in block_hashes]
        return [block_id for block_id in found if block_id is not None]
