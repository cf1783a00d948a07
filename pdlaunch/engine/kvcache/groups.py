"""Divides layers into KV cache groups, and defines the shape of a KV block.

The layers of a group have the same attention: full, or one sliding window. All groups have the same
number of layers, so that one pool of equal blocks serves all groups. A request has a block table
for each group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVCacheGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]  # model layers, in the order of their slots in a block
    # Tokens that attention sees, with the current token; None: all tokens.
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """The shape of one rank's KV cache: ``[num_blocks, num_kv_heads, num_layers_per_block, 2,
    block_size, head_dim]``. Blocks first, then heads, so that a block is contiguous, and each head
    within a block is contiguous.
    """

    groups: tuple[KVCacheGroup, ...]
    num_kv_heads: int  # KV heads of this rank
    head_dim: int
    block_size: int
    dtype_bytes: int

    @property
    def num_layers_per_block(self) -> int:
        return max(len(group.layers) for group in self.groups)

    @property
    def head_bytes(self) -> int:
        """Return the size of one KV head in one block: all layers of a group, K and V."""
        return self.num_layers_per_block * 2 * self.block_size * self.head_dim * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_kv_heads, self.num_layers_per_block, 2, self.block_size, self.head_dim)


def num_kv_heads_of_rank(num_kv_heads: int, tp_size: int) -> int:
    """Return the number of KV heads of a rank, rounded down; at least 1, which ranks may share."""
    return max(1, num_kv_heads // tp_size)


def make_groups(layer_windows: Sequence[int | None]) -> tuple[KVCacheGroup, ...]:
    """Divide layers into groups with the same window, full groups first. The rarest kind of layer
    sets the size of all groups. Gemma 3 has 4 full and 22 sliding layers: one full group and six
    sliding groups, the last with two layers.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(layer_windows):
        kinds.setdefault(window, []).append(layer)
    # With larger groups, the blocks of the rarest kind would have empty slots.
    size = min(len(layers) for layers in kinds.values())
    ordered = sorted(kinds.items(), key=lambda kind: (kind[0] is not None, kind[0] or 0))
    return tuple(
        KVCacheGroup(tuple(layers[start : start + size]), window)
        for window, layers in ordered
        for start in range(0, len(layers), size)
    )


def first_visible(window: int | None, num_computed: int, block_size: int) -> int:
    """Return the first logical block that the query at token ``num_computed`` sees."""
    # The query at num_computed sees tokens [num_computed - window + 1, num_computed].
    return 0 if window is None else max(0, num_computed - window + 1) // block_size


def longest_prefix(
    windows: Sequence[int | None],
    block_size: int,
    max_blocks: int,
    end_of: Callable[[int, int, int], int],
) -> int:
    """Return the length in blocks of the longest available prefix. A full group must have all
    blocks of the prefix, a sliding group those that the next token sees. ``end_of(group, start,
    limit)``: the group's first gap from ``start`` on, or ``limit``.
    """
    length, before = max_blocks, -1
    # A shorter prefix moves the windows of all groups, which then need other blocks: repeat until
    # no group shortens the prefix.
    while length != before:
        before = length
        for group, window in enumerate(windows):
            start = first_visible(window, length * block_size, block_size)
            # At any length above ``end``, the window contains the gap: try ``end``.
            while (end := end_of(group, start, length)) < length:
                length = end
                start = first_visible(window, length * block_size, block_size)
    return length


def span_blocks(window: int, block_size: int) -> int:
    """Return the largest number of blocks that ``window`` consecutive tokens can span."""
    return (window + block_size - 2) // block_size + 1


def min_blocks(windows: Sequence[int | None], block_size: int, num_tokens: int) -> int:
    """Return the number of blocks in all groups for ``num_tokens`` tokens computed one by one."""
    num_logical = -(-num_tokens // block_size)
    return sum(
        num_logical if window is None else min(num_logical, span_blocks(window, block_size))
        for window in windows
    )
