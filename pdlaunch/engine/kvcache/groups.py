"""Forms KV cache groups; gives the shape of a KV block.

A model's layers are sorted by what they keep of the past (all tokens, or a sliding window) and cut
into groups of equal size, so that one pool of equal-sized blocks serves all groups. Each group has
its own block table for every request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVCacheGroup:
    """Names the layers that share block tables."""

    layers: tuple[int, ...]  # model layers in the order of their slot in the block
    # Tokens that attention sees, the current one included; None sees all
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Gives the shape of one rank's KV cache.

    It is ``[num_blocks, num_kv_heads, num_layers_per_block, 2, block_size, head_dim]``:
    block-major, then heads, so that a block is one contiguous region, and so is one head's share of
    it.
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
        """Return the bytes of one KV head in one block: all layers of a group, K and V."""
        return self.num_layers_per_block * 2 * self.block_size * self.head_dim * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_kv_heads, self.num_layers_per_block, 2, self.block_size, self.head_dim)


def num_kv_heads_of_rank(num_kv_heads: int, tp_size: int) -> int:
    """Return how many KV heads a rank holds, its own or a shared one; rounded down."""
    return max(1, num_kv_heads // tp_size)


def make_groups(layer_windows: Sequence[int | None]) -> tuple[KVCacheGroup, ...]:
    """Cut layers into groups of one kind each and of equal size.

    ``layer_windows``: for each layer its sliding window in tokens, or None for full attention. The
    size of a group is that of the rarest kind (Gemma 3: 4 full and 22 sliding layers give one full
    group and six sliding ones, the last with two layers). Full groups come first.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(layer_windows):
        kinds.setdefault(window, []).append(layer)
    # Larger groups would leave slots of the rarest kind's blocks empty.
    size = min(len(layers) for layers in kinds.values())
    ordered = sorted(kinds.items(), key=lambda kind: (kind[0] is not None, kind[0] or 0))
    return tuple(
        KVCacheGroup(tuple(layers[start : start + size]), window)
        for window, layers in ordered
        for start in range(0, len(layers), size)
    )


def first_visible(window: int | None, num_computed: int, block_size: int) -> int:
    """Return the first logical block that tokens from ``num_computed`` on see."""
    # The query at num_computed sees tokens [num_computed - window + 1, num_computed].
    return 0 if window is None else max(0, num_computed - window + 1) // block_size


def longest_prefix(
    windows: Sequence[int | None],
    block_size: int,
    max_blocks: int,
    end_of: Callable[[int, int, int], int],
) -> int:
    """Return after how many logical blocks, ``max_blocks`` at most, a request can compute on.

    Every full group has all these blocks, every sliding group those that the next token sees.
    ``end_of(group, start, limit)``: where the blocks that the group has from ``start`` on end.
    """
    length, before = max_blocks, -1
    # A shorter prefix moves every window towards the beginning, where other blocks have to be
    # there: repeat until no group shortens it any more.
    while length != before:
        before = length
        for group, window in enumerate(windows):
            start = first_visible(window, length * block_size, block_size)
            # A missing block is visible from every length between: try one that ends before it.
            while (end := end_of(group, start, length)) < length:
                length = end
                start = first_visible(window, length * block_size, block_size)
    return length


def span_blocks(window: int, block_size: int) -> int:
    """Return the most blocks that ``window`` neighbouring tokens touch."""
    return (window + block_size - 2) // block_size + 1


def min_blocks(windows: Sequence[int | None], block_size: int, num_tokens: int) -> int:
    """Return the blocks without which ``num_tokens`` tokens cannot be computed, even one at a time.

    ``windows``: the sliding window of each group; a full group (None) keeps every block.
    """
    num_logical = -(-num_tokens // block_size)
    return sum(
        num_logical if window is None else min(num_logical, span_blocks(window, block_size))
        for window in windows
    )
