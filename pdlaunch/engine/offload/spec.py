"""A transfer between device and host names its blocks and chunks; the layout says where each block
lies in host memory. No torch.

A host chunk holds ``blocks_per_chunk`` device blocks of one group, consecutive in the request. A
transfer may begin and end inside a chunk. Two groups, two blocks a chunk::

    block_ids      [ 7  4  9 | 3  8 ]      group_sizes  [3, 2]
    block_indices  [ 1       | 6    ]      logical index of each group's first block
    chunk_ids      [ 5   2   | 0    ]      group 0 skips 1 % 2 = 1 slot: ceil((3 + 1) / 2) chunks

    chunk 5  [ .  7 ]    chunk 2  [ 4  9 ]    chunk 0  [ 3  8 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pdlaunch.engine.kvcache.groups import aligned_chunk_bytes
from pdlaunch.errors import TransferSpecError

Direction = Literal["store", "load"]  # ``store``: device to host; ``load``: host to device

DIRECTIONS: tuple[Direction, Direction] = ("store", "load")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """Blocks to copy; the sequences are flat and ordered by group. A group may be empty."""

    direction: Direction
    block_ids: Sequence[int] | IntArray  # device blocks
    group_sizes: Sequence[int]  # number of blocks of each group
    block_indices: Sequence[int]
    """For each group the logical index of its first block within the request; it means nothing
    where the group is empty.
    """
    chunk_ids: Sequence[int] | IntArray
    """Host chunks, ceil((size + skip) / blocks_per_chunk) of each group."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Describes one KV cache group on the device."""

    num_blocks: int
    page_bytes: tuple[int, ...]  # bytes of one block in each tensor of the group

    @property
    def block_bytes(self) -> int:
        return sum(self.page_bytes)


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Counts the blocks of one group in a transfer, in logical order."""

    group: int
    skip: int  # slots of the first chunk before the first block
    block_ids: IntArray
    chunk_ids: IntArray


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Lays chunks out in host memory: one pool of equal chunks serves all groups, and the blocks of
    a chunk follow one another.

    A group with smaller blocks than others leaves the end of its chunks unused.
    """

    groups: tuple[GroupShape, ...]
    blocks_per_chunk: int

    @property
    def chunk_bytes(self) -> int:
        used_bytes = self.blocks_per_chunk * max(group.block_bytes for group in self.groups)
        return aligned_chunk_bytes(used_bytes)

    def num_chunks_used(self, size: int, block_index: int) -> int:
        """Return how many chunks ``size`` blocks from logical ``block_index`` on touch."""
        return (
            -(-(size + block_index % self.blocks_per_chunk) // self.blocks_per_chunk) if size else 0
        )

    def places(self, span: GroupSpan) -> tuple[IntArray, IntArray]:
        """Return for each block of the span its chunk and its first byte in the chunk."""
        # Slots before ``skip`` and after the last block belong to the first and last chunk, and are
        # not used.
        used = slice(span.skip, span.skip + len(span.block_ids))
        offsets = (
            np.arange(self.blocks_per_chunk, dtype=np.int64) * self.groups[span.group].block_bytes
        )
        return np.repeat(span.chunk_ids, self.blocks_per_chunk)[used], np.tile(
            offsets, len(span.chunk_ids)
        )[used]

    def split(self, spec: TransferSpec, num_chunks: int) -> list[GroupSpan]:
        """Return the spans of the groups that are not empty. Raises TransferSpecError, which names
        the group and both numbers.
        """
        self._check_lengths(spec)
        block_ids = _Ids("block_ids", spec.block_ids)
        chunk_ids = _Ids("chunk_ids", spec.chunk_ids)
        spans = []
        for group, (size, block_index) in enumerate(
            zip(spec.group_sizes, spec.block_indices, strict=True)
        ):
            if size:
                blocks = block_ids.take(group, size, self.groups[group].num_blocks)
                chunks = chunk_ids.take(group, self.num_chunks_used(size, block_index), num_chunks)
                spans.append(GroupSpan(group, block_index % self.blocks_per_chunk, blocks, chunks))
        block_ids.check_end(len(self.groups))
        chunk_ids.check_end(len(self.groups))
        _check_chunks_differ(spans)
        return spans

    def _check_lengths(self, spec: TransferSpec) -> None:
        if spec.direction not in DIRECTIONS:
            raise TransferSpecError(
                f"direction is {spec.direction!r}; it must be 'store' or 'load'"
            )
        for name, values in (
            ("group_sizes", spec.group_sizes),
            ("block_indices", spec.block_indices),
        ):
            if len(values) != len(self.groups):
                group = min(len(values), len(self.groups))
                raise TransferSpecError(
                    f"{name} has {len(values)} entries, the KV cache has {len(self.groups)} "
                    f"groups: wrong from group {group} on"
                )
            for group, value in enumerate(values):
                if value < 0:
                    raise TransferSpecError(f"group {group}: {name} is {value}, the least is 0")


class _Ids:
    """Holds a flat list of ids that the groups take their share of, one after another."""

    def __init__(self, name: str, ids: Sequence[int] | IntArray) -> None:
        self._name = name
        self._ids = np.asarray(ids, dtype=np.int64)
        self._taken = 0

    def take(self, group: int, count: int, limit: int) -> IntArray:
        """Return the group's ids; each must be in [0, limit) and none may stand twice."""
        left = len(self._ids) - self._taken
        if left < count:
            raise TransferSpecError(
                f"group {group} needs {count} {self._name}, {left} are left for it"
            )
        ids = self._ids[self._taken : self._taken + count]
        self._taken += count
        ordered = np.sort(ids)
        if count and (ordered[0] < 0 or ordered[-1] >= limit):
            wrong = ids[(ids < 0) | (ids >= limit)][0]
            raise TransferSpecError(
                f"group {group}: {wrong} in {self._name} is not an id, ids are below {limit}"
            )
        twice = _first_twice(ordered)
        if twice is not None:
            raise TransferSpecError(
                f"group {group}: {twice} stands 2 times in {self._name}, once is allowed"
            )
        return ids

    def check_end(self, num_groups: int) -> None:
        if self._taken != len(self._ids):
            raise TransferSpecError(
                f"{self._name} has {len(self._ids)} entries, the groups up to group "
                f"{num_groups - 1} need {self._taken}"
            )


def _check_chunks_differ(spans: Sequence[GroupSpan]) -> None:
    """Raise TransferSpecError when two groups use the same chunk: they share one pool."""
    if len(spans) < 2:
        return
    twice = _first_twice(np.sort(np.concatenate([span.chunk_ids for span in spans])))
    if twice is not None:
        first, second, *_ = (span.group for span in spans if twice in span.chunk_ids)
        raise TransferSpecError(f"group {first} and group {second} both use chunk {twice}")


def _first_twice(ordered: IntArray) -> int | None:
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(twice[0]) if twice.size else None
