"""Paged attention with torch's own operators: for CPUs, and as the reference of other backends.

Decode rows of similar length form a bucket and are padded to its longest row. Each bucket takes one
gather and one attention call for each layer. Query heads that share a KV head become query rows,
so keys and values are not repeated. Chunks of prompts are attended one by one.

``kv_cache: [num_blocks, H, L, 2, B, D]`` (heads, layers of a block, block size, head dim) is viewed
as rows, with these indices::

    row of D:      (((block * H + head) * L + slot) * 2 + is_value) * B + offset
    row of B * D:   ((block * H + head) * L + slot) * 2 + is_value

Indices are computed for slot 0. A layer in slot s uses them in a view that starts 2 * s rows of
B * D later.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.models.attention import AttentionBackend, AttentionStep, IntArray, PackedBatch

# Limit for the gathered keys and values of a bucket: with longer contexts, buckets have fewer rows.
MAX_BUCKET_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens that are attended together: decode rows of similar length, or one chunk."""

    tokens: torch.Tensor | slice  # indices of the packed tokens
    # [2 * num_rows * H * num_blocks] int64, rows of B * D: all keys, then all values. None: a chunk
    # at the beginning of its prompt, which attends over its own keys and values
    gather: torch.Tensor | None
    # 0 or -inf; decode rows: [num_rows, 1, 1, num_blocks * B], a chunk: [num_tokens, context].
    # None: causal attention within the chunk
    mask: torch.Tensor | None
    num_rows: int = 0  # number of decode rows; 0: a chunk


@dataclass(frozen=True, slots=True)
class _GroupStep:
    """Inputs that the layers of one KV cache group share in a step."""

    write: torch.Tensor  # [num_tokens * H] int64, rows of D to write to; token-major
    parts: list[_Part]


class TorchAttention(AttentionBackend):
    """Attends on any device. ``kv_cache``: of the shape in ``layout``, in the model's dtype."""

    def __init__(self, layout: KVCacheLayout, kv_cache: torch.Tensor) -> None:
        self.layout = layout
        self.place = {
            layer: (index, slot)
            for index, group in enumerate(layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        self.token_rows = kv_cache.view(-1, layout.head_dim)
        self.block_rows = kv_cache.view(-1, layout.block_size * layout.head_dim)
        # Size of a layer's keys and values in one block, for all heads.
        self._layer_bytes = 2 * layout.num_kv_heads * self.block_rows[0].nbytes
        self._workspace = self.block_rows[:0]

    def prepare(self, batch: PackedBatch) -> AttentionStep:
        groups = []
        for group, table in zip(self.layout.groups, batch.block_tables, strict=True):
            blocks, offsets = np.divmod(batch.positions, self.layout.block_size)
            rows = self._head_rows(table[batch.row_of_token, blocks]) * self.layout.block_size
            write = self._tensor((rows + offsets[:, None]).reshape(-1))
            chunks = range(batch.num_decode_rows, batch.num_rows)
            parts = [
                *self._make_buckets(group, table, batch),
                *(self._make_chunk(group, table, batch, row) for row in chunks),
            ]
            groups.append(_GroupStep(write, parts))
        gathers = [part.gather for group in groups for part in group.parts]
        num_rows = max((len(gather) for gather in gathers if gather is not None), default=0)
        if len(self._workspace) < num_rows:
            # One workspace for all gathers: new memory for each would take longer than the copy.
            self._workspace = self.block_rows.new_empty(
                (num_rows * 5 // 4, self.block_rows.shape[1])
            )
        return _TorchStep(self, groups)

    def gather(self, index: torch.Tensor, slot: int) -> torch.Tensor:
        """Copy rows of B * D into the workspace, which the next gather overwrites."""
        return torch.index_select(
            self.block_rows[2 * slot :], 0, index, out=self._workspace[: len(index)]
        )

    def _make_buckets(
        self, group: KVCacheGroup, table: IntArray, batch: PackedBatch
    ) -> Iterator[_Part]:
        """Divide decode rows into buckets, the longest rows first. A row shorter than half of the
        longest begins a new bucket, so padding at most doubles the length.
        """
        size, window = self.layout.block_size, group.sliding_window
        lengths = batch.context_lengths[: batch.num_decode_rows]
        first, num_blocks = self._blocks_in_sight(window, lengths - 1, lengths)
        order = np.argsort(-num_blocks, kind="stable")
        # If all rows have similar lengths, keep their order: if they form one bucket, its tokens
        # are a slice.
        if len(order) and num_blocks[order[-1]] * 2 >= num_blocks[order[0]]:
            order = np.arange(len(order))
        start = 0
        while start < len(order):
            longest = int(num_blocks[order[start:]].max())
            most_rows = max(1, MAX_BUCKET_BYTES // (longest * self._layer_bytes))
            stop = min(start + most_rows, len(order))
            too_short = np.flatnonzero(num_blocks[order[start:stop]] * 2 < longest)
            stop = start + int(too_short[0]) if len(too_short) else stop
            rows = order[start:stop]
            start = stop
            # Entries past a row's end repeat the row's last block, which has finite numbers.
            last = num_blocks[rows, None] - 1
            columns = first[rows, None] + np.minimum(np.arange(longest), last)
            positions = first[rows, None] * size + np.arange(longest * size)
            visible = positions < lengths[rows, None]
            if window is not None:
                visible &= positions >= lengths[rows, None] - window
            yield _Part(
                slice(len(rows)) if len(rows) == batch.num_rows else self._tensor(rows),
                self._gather_index(table[rows[:, None], columns]),
                self._mask(visible)[:, None, None, :],
                num_rows=len(rows),
            )

    def _make_chunk(
        self, group: KVCacheGroup, table: IntArray, batch: PackedBatch, row: int
    ) -> _Part:
        start, stop = int(batch.row_starts[row]), int(batch.row_starts[row + 1])
        length, window = int(batch.context_lengths[row]), group.sliding_window
        tokens, before = slice(start, stop), length - (stop - start)
        # 0 ........ seen_from ................. before ............ length
        #   not seen │   computed earlier   │  the chunk, just written  │
        gather, seen_from, context = None, 0, length
        if before > 0:
            first, num_blocks = self._blocks_in_sight(window, np.array(before), np.array(length))
            blocks = table[row, int(first) : int(first + num_blocks)]
            gather = self._gather_index(blocks[None, :])
            seen_from = int(first) * self.layout.block_size
            context = int(num_blocks) * self.layout.block_size
        elif window is None or length <= window:
            return _Part(tokens, None, None)
        queries = before + np.arange(stop - start)[:, None]
        keys = seen_from + np.arange(context)[None, :]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return _Part(tokens, gather, self._mask(visible))

    def _blocks_in_sight(
        self, window: int | None, positions: IntArray, lengths: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return the first block that a query at ``positions`` sees, and how many follow to
        ``lengths``.
        """
        size = self.layout.block_size
        first = np.zeros_like(positions)
        if window is not None:
            first = np.maximum(positions - window + 1, 0) // size
        return first, -(-lengths // size) - first

    def _head_rows(self, blocks: IntArray) -> IntArray:
        """Return the indices of the keys of slot 0 as rows of B * D: [..., H]."""
        heads = np.arange(self.layout.num_kv_heads)
        rows: IntArray = blocks[..., None] * self.layout.num_kv_heads + heads
        return rows * self.layout.num_layers_per_block * 2

    def _gather_index(self, blocks: IntArray) -> torch.Tensor:
        """Return the indices of all keys, then of all values, each by row, head and block."""
        keys = self._head_rows(blocks).transpose(0, 2, 1).reshape(-1)
        return self._tensor(np.concatenate([keys, keys + 1]))

    def _mask(self, visible: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> torch.Tensor:
        shown = torch.from_numpy(visible).to(self.token_rows.device)
        return self.token_rows.new_zeros(visible.shape).masked_fill_(~shown, float("-inf"))

    def _tensor(self, array: IntArray) -> torch.Tensor:
        content = np.ascontiguousarray(array, dtype=np.int64)
        return torch.from_numpy(content).to(self.token_rows.device)


class _TorchStep(AttentionStep):
    def __init__(self, backend: TorchAttention, groups: list[_GroupStep]) -> None:
        self._backend = backend
        self._groups = groups

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        index, slot = self._backend.place[layer]
        group, layout = self._groups[index], self._backend.layout
        # Write first: decode rows and later chunks read even their own keys from the KV cache.
        for first, states in ((2 * slot, key), (2 * slot + 1, value)):
            rows = self._backend.token_rows[first * layout.block_size :]
            rows.index_copy_(0, group.write, states.transpose(0, 1).reshape(-1, layout.head_dim))
        result: torch.Tensor | None = None
        for part in group.parts:
            is_all = len(group.parts) == 1
            heads = query if is_all else query[:, part.tokens]
            if part.gather is None:
                keys, values = key[:, part.tokens], value[:, part.tokens]
            else:
                # For each row and KV head, all blocks one after another.
                shape = (2, part.num_rows or 1, layout.num_kv_heads, -1, layout.head_dim)
                keys, values = self._backend.gather(part.gather, slot).view(shape)
            attended = self._attend(part, heads, keys, values, scaling)
            if is_all:
                return attended
            if result is None:
                result = query.new_empty((query.shape[1], query.shape[0], query.shape[2]))
            result[part.tokens] = attended
        assert result is not None, "a step without tokens"
        return result

    def _attend(
        self,
        part: _Part,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, head_dim] of the part's tokens. ``keys``, ``values``:
        [num_rows, H, .., D] if gathered, else the chunk's own, [H, .., D].
        """
        num_heads, _, head_dim = query.shape
        num_kv_heads = self._backend.layout.num_kv_heads
        share = num_heads // num_kv_heads
        if part.num_rows:
            grouped = query.transpose(0, 1).reshape(part.num_rows, num_kv_heads, share, head_dim)
            attended = _attend_contiguous(grouped, keys, values, part.mask, scaling)
            return attended.reshape(part.num_rows, num_heads, head_dim)
        grouped = query.reshape(num_kv_heads, share, -1, head_dim)
        if part.gather is not None:
            keys, values = keys[0], values[0]
        attended = _attend_contiguous(grouped, keys[:, None], values[:, None], part.mask, scaling)
        return attended.flatten(0, 1).transpose(0, 1)


def _attend_contiguous(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend over contiguous ``keys`` and ``values``, [.., num_keys, D]. ``mask`` None: causal."""
    return scaled_dot_product_attention(
        query,
        keys.expand(*query.shape[:-2], -1, -1),
        values.expand(*query.shape[:-2], -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )
