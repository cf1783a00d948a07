"""Keeps the block tables of one request, one for each KV cache group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class BlockTables:
    """Says which block holds which tokens of one request.

    Logical block i of a group holds tokens [i * block_size, (i + 1) * block_size). All groups end
    at the same logical block. A sliding group begins later: its earlier blocks have left the
    window.

        logical block    0   1   2   3   4
        full group     [ a   b   c   d   e ]     first 0, end 5
        sliding group          [ v   w   x ]     first 2, end 5
    """

    __slots__ = ("block_ids", "end", "first", "next_release")

    def __init__(self, num_groups: int) -> None:
        self.first = [0] * num_groups
        """Logical index of the first block held, by group."""
        self.end = 0
        """Logical index after the last block held."""
        self.block_ids: list[list[int]] = [[] for _ in range(num_groups)]
        """The blocks [first, end), by group."""
        self.next_release = 0
        """Number of computed tokens from which on the next block has left a window."""

    def append(self, first: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        """Add by group the blocks from ``first[group]`` on.

        A group without blocks may begin anywhere.
        """
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
        """Return the blocks of the logical indices [start, end) that the group still holds."""
        first = self.first[group]
        return self.block_ids[group][max(0, start - first) : max(0, end - first)]

    def pop_before(self, group: int, index: int) -> list[int]:
        """Take away the blocks before logical ``index``."""
        count = max(0, index - self.first[group])
        popped = self.block_ids[group][:count]
        del self.block_ids[group][:count]
        self.first[group] += len(popped)
        return popped

    def all_ids(self) -> Iterator[int]:
        for held in self.block_ids:
            yield from held
