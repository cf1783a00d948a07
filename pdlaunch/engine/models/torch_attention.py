"""Paged attention with torch's own operators: for CPUs, and as the reference of other backends.

Rows of one token are padded to buckets of like length; one gather and one attention call a bucket
and layer. Query heads that share a KV head become query rows, so that keys and values are never
repeated. Chunks of prompts are attended one by one.

Index arithmetic over ``kv_cache: [num_blocks, H, L, 2, B, D]`` (heads, layers of a block, block
size, head dim), seen as rows::

    row of D:      (((block * H + head) * L + slot) * 2 + is_value) * B + offset
    row of B * D:   ((block * H + head) * L + slot) * 2 + is_value

Indices are made for slot 0; a layer in slot s reads from the view that starts 2 * s (times B) rows
later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.models.attention import AttentionBackend, AttentionStep, IntArray, PackedBatch

MAX_BUCKET_BYTES = 64 * 1024**2
"""Gathered keys and values of one bucket; a longer context makes buckets of fewer rows."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Holds decode rows that are attended together."""

    rows: torch.Tensor  # [num_rows] int64; which of the packed tokens
    is_all: bool  # these are all rows of the step, in their order
    gather: torch.Tensor
    """[2 * num_rows * H * num_blocks] int64; rows of B * D: all keys, then all values"""
    mask: torch.Tensor  # [num_rows, 1, 1, num_blocks * B]; 0 or -inf


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Holds some tokens of one prompt."""

    start: int
    stop: int
    gather: torch.Tensor | None
    """[2 * H * num_blocks] int64, or None: nothing before this chunk, attend over its own keys and
    values
    """
    mask: torch.Tensor | None
    """[num_tokens, context]; 0 or -inf. None: causal, context is the chunk itself"""


@dataclass(frozen=True, slots=True)
class _GroupStep:
    """Holds what the layers of one KV cache group share in a step."""

    write: torch.Tensor  # [num_tokens * H] int64; rows of D, token-major
    buckets: tuple[_Bucket, ...]
    chunks: tuple[_Chunk, ...]


class TorchAttention(AttentionBackend):
    """Attends on any device over ``kv_cache`` as ``KVCacheLayout`` says, in the model's dtype."""

    def __init__(self, layout: KVCacheLayout, kv_cache: torch.Tensor) -> None:
        self.layout = layout
        self.place = {
            layer: (index, slot)
            for index, group in enumerate(layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        self.token_rows = kv_cache.view(-1, layout.head_dim)
        self.block_rows = kv_cache.view(-1, layout.block_size * layout.head_dim)
        self._workspace = self.block_rows.new_empty((0, layout.block_size * layout.head_dim))

    def prepare(self, batch: PackedBatch) -> AttentionStep:
        groups = tuple(
            self._prepare_group(group, table, batch)
            for group, table in zip(self.layout.groups, batch.block_tables, strict=True)
        )
        gathers = [bucket.gather for group in groups for bucket in group.buckets]
        gathers += [
            chunk.gather for group in groups for chunk in group.chunks if chunk.gather is not None
        ]
        self._reserve(max((len(gather) for gather in gathers), default=0))
        return _TorchStep(self, groups)

    def gather(self, index: torch.Tensor, slot: int) -> torch.Tensor:
        """Copy rows of B * D into the work space, which the next gather overwrites."""
        return torch.index_select(
            self.block_rows[2 * slot :], 0, index, out=self._workspace[: len(index)]
        )

    def _reserve(self, num_rows: int) -> None:
        """Keep memory for gathers: fresh memory for each would cost more than the copy."""
        if len(self._workspace) < num_rows:
            self._workspace = self.block_rows.new_empty(
                (num_rows * 5 // 4, self.block_rows.shape[1])
            )

    def _prepare_group(
        self, group: KVCacheGroup, table: IntArray, batch: PackedBatch
    ) -> _GroupStep:
        size = self.layout.block_size
        blocks = table[batch.row_of_token, batch.positions // size]
        write = self._head_rows(blocks) * size + (batch.positions % size)[:, None]
        return _GroupStep(
            write=self._tensor(write.reshape(-1)),
            buckets=tuple(self._make_buckets(group, table, batch)),
            chunks=tuple(
                self._make_chunk(group, table, batch, row)
                for row in range(batch.num_decode_rows, batch.num_rows)
            ),
        )

    def _make_buckets(
        self, group: KVCacheGroup, table: IntArray, batch: PackedBatch
    ) -> Iterator[_Bucket]:
        """Sort rows into buckets, the longest first.

        A row less than half as long as the bucket's first opens the next, so padding at most
        doubles.
        """
        lengths = batch.context_lengths[: batch.num_decode_rows]
        first, num_blocks = self._blocks_in_sight(group, lengths - 1, lengths)
        order = np.argsort(-num_blocks, kind="stable")
        # All are of like length. In their own order they can be one bucket, of which nothing has to
        # be picked out (``is_all``).
        if len(order) and num_blocks[order[-1]] * 2 >= num_blocks[order[0]]:
            order = np.arange(len(order))
        start = 0
        while start < len(order):
            longest = int(num_blocks[order[start:]].max())
            stop = min(start + self._max_rows(longest), len(order))
            too_short = np.flatnonzero(num_blocks[order[start:stop]] * 2 < longest)
            stop = start + int(too_short[0]) if len(too_short) else stop
            rows = order[start:stop]
            yield self._make_bucket(
                group, table, rows, lengths, first, num_blocks, is_all=len(rows) == batch.num_rows
            )
            start = stop

    def _make_bucket(
        self,
        group: KVCacheGroup,
        table: IntArray,
        rows: IntArray,
        lengths: IntArray,
        first: IntArray,
        num_blocks: IntArray,
        *,
        is_all: bool,
    ) -> _Bucket:
        # Entries past a row's end repeat its last block: what lies there is finite, and nobody
        # else's.
        longest = int(num_blocks[rows].max())
        columns = first[rows, None] + np.minimum(
            np.arange(longest)[None, :], num_blocks[rows, None] - 1
        )
        blocks = table[rows[:, None], columns]
        positions = (
            first[rows, None] * self.layout.block_size
            + np.arange(longest * self.layout.block_size)[None, :]
        )
        visible = positions < lengths[rows, None]
        if group.sliding_window is not None:
            visible &= positions >= lengths[rows, None] - group.sliding_window
        return _Bucket(
            rows=self._tensor(rows),
            is_all=is_all,
            gather=self._gather_index(blocks),
            mask=self._mask(visible)[:, None, None, :],
        )

    def _make_chunk(
        self, group: KVCacheGroup, table: IntArray, batch: PackedBatch, row: int
    ) -> _Chunk:
        start, stop = int(batch.row_starts[row]), int(batch.row_starts[row + 1])
        length, window = int(batch.context_lengths[row]), group.sliding_window
        first_position = length - (stop - start)
        if first_position == 0:
            fits = window is None or length <= window
            return _Chunk(
                start, stop, None, None if fits else self._chunk_mask(window, 0, 0, length, length)
            )
        first, num_blocks = self._blocks_in_sight(
            group, np.array([first_position]), np.array([length])
        )
        blocks = table[row, first[0] : first[0] + num_blocks[0]]
        # 0 ........ seen_from ............ first_position ............ length
        #   not seen │  computed earlier    │  the chunk, just written  │
        seen_from = int(first[0]) * self.layout.block_size
        context = int(num_blocks[0]) * self.layout.block_size
        mask = self._chunk_mask(window, first_position, seen_from, stop - start, context)
        return _Chunk(start, stop, self._gather_index(blocks[None, :]), mask)

    def _chunk_mask(
        self, window: int | None, first: int, seen_from: int, num_tokens: int, context: int
    ) -> torch.Tensor:
        queries = first + np.arange(num_tokens)[:, None]
        keys = seen_from + np.arange(context)[None, :]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return self._mask(visible)

    def _blocks_in_sight(
        self, group: KVCacheGroup, positions: IntArray, lengths: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return the first block that a query at ``positions`` sees, and how many follow up to
        ``lengths``.

        Earlier ones are not read.
        """
        size = self.layout.block_size
        if group.sliding_window is None:
            first = np.zeros_like(positions)
        else:
            first = np.maximum(positions - group.sliding_window + 1, 0) // size
        return first, -(-lengths // size) - first

    def _max_rows(self, num_blocks: int) -> int:
        layout = self.layout
        row_bytes = (
            num_blocks
            * layout.num_kv_heads
            * 2
            * layout.block_size
            * layout.head_dim
            * layout.dtype_bytes
        )
        return max(1, MAX_BUCKET_BYTES // row_bytes)

    def _head_rows(self, blocks: IntArray) -> IntArray:
        """Return [..., H]: rows of B * D of the keys of slot 0."""
        heads = np.arange(self.layout.num_kv_heads)
        rows: IntArray = (
            (blocks[..., None] * self.layout.num_kv_heads + heads)
            * self.layout.num_layers_per_block
            * 2
        )
        return rows

    def _gather_index(self, blocks: IntArray) -> torch.Tensor:
        """Return indices in the order keys, then values, each by row, head, block.

        ``blocks``: [num_rows, num_blocks].
        """
        keys = self._head_rows(blocks).transpose(0, 2, 1).reshape(-1)
        return self._tensor(np.concatenate([keys, keys + 1]))

    def _mask(self, visible: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> torch.Tensor:
        shown = torch.from_numpy(visible).to(self.token_rows.device)
        mask = torch.zeros(
            visible.shape, dtype=self.token_rows.dtype, device=self.token_rows.device
        )
        return mask.masked_fill_(~shown, float("-inf"))

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(
            self.token_rows.device
        )


class _TorchStep(AttentionStep):
    def __init__(self, backend: TorchAttention, groups: tuple[_GroupStep, ...]) -> None:
        self._backend = backend
        self._groups = groups

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        index, slot = self._backend.place[layer]
        group = self._groups[index]
        # First: rows of one token, and chunks behind others, read their own keys from the cache.
        self._write(group.write, slot, key, value)
        if len(group.buckets) == 1 and group.buckets[0].is_all:
            return self._attend_bucket(
                group.buckets[0], slot, query.transpose(0, 1), scaling, sinks
            )
        result = query.new_empty((query.shape[1], query.shape[0], query.shape[2]))
        for bucket in group.buckets:
            rows = query.index_select(1, bucket.rows).transpose(0, 1)
            result[bucket.rows] = self._attend_bucket(bucket, slot, rows, scaling, sinks)
        for chunk in group.chunks:
            result[chunk.start : chunk.stop] = self._attend_chunk(
                chunk, slot, query, key, value, scaling, sinks
            )
        return result

    def _write(
        self, index: torch.Tensor, slot: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        layout, rows = self._backend.layout, self._backend.token_rows
        first_row = 2 * slot * layout.block_size
        rows[first_row:].index_copy_(0, index, key.transpose(0, 1).reshape(-1, layout.head_dim))
        rows[first_row + layout.block_size :].index_copy_(
            0, index, value.transpose(0, 1).reshape(-1, layout.head_dim)
        )

    def _attend_bucket(
        self,
        bucket: _Bucket,
        slot: int,
        query: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend for a bucket; ``query`` and the result are [num_rows, num_heads, head_dim]."""
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads = self._backend.layout.num_kv_heads
        keys, values = self._backend.gather(bucket.gather, slot).view(
            2, num_rows, num_kv_heads, -1, head_dim
        )
        grouped = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        by_head = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
        attended = _attend(grouped, keys, values, bucket.mask, scaling, by_head)
        return attended.reshape(num_rows, num_heads, head_dim)

    def _attend_chunk(
        self,
        chunk: _Chunk,
        slot: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, head_dim] of the chunk's tokens."""
        num_heads, _, head_dim = query.shape
        num_kv_heads = self._backend.layout.num_kv_heads
        share = num_heads // num_kv_heads
        if chunk.gather is None:
            keys, values = key[:, chunk.start : chunk.stop], value[:, chunk.start : chunk.stop]
        else:
            keys, values = self._backend.gather(chunk.gather, slot).view(
                2, num_kv_heads, -1, head_dim
            )
        grouped = query[:, chunk.start : chunk.stop].reshape(num_kv_heads, share, -1, head_dim)
        by_head = None if sinks is None else sinks.view(num_kv_heads, share, 1, 1)
        attended = _attend(grouped, keys[:, None], values[:, None], chunk.mask, scaling, by_head)
        return attended.flatten(0, 1).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend over contiguous keys and values.

    ``query``: [.., num_queries, D]; ``keys``, ``values``: [.., num_keys, D]; ``mask`` None: causal.

    ``sinks``: [.., num_queries or 1, 1]. A sink is the score of one more key, which stands before
    all others and whose value is zero. It gets a dimension of its own: there the query holds the
    sink, and only that key is not zero. Under a causal mask one more query is added in front too,
    so that the diagonal stays where it is.
    """
    if sinks is not None:
        query = torch.cat([query, sinks.to(query.dtype).expand(*query.shape[:-1], 1)], dim=-1)
        keys, values = pad(keys, (0, 1, 1, 0)), pad(values, (0, 1, 1, 0))
        keys[..., 0, -1] = 1 / scaling
        query, mask = (
            (pad(query, (0, 0, 1, 0)), None) if mask is None else (query, pad(mask, (1, 0)))
        )
    attended = scaled_dot_product_attention(
        query,
        keys.expand(*query.shape[:-2], -1, -1),
        values.expand(*query.shape[:-2], -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )
    if sinks is None:
        return attended
    return attended[..., :-1] if mask is not None else attended[..., 1:, :-1]
