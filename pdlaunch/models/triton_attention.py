"""Paged attention on CUDA devices with Triton kernels, and torch's varlen flash attention for
prompts in 16 bits.

Decode reads the KV cache in place, in splits of the context. Whole prompts go through cuDNN where
it is faster; other chunks through flash attention, with what lies before them gathered into
contiguous memory; in float32, and where heads have sinks, through a Triton kernel. Nothing past a
row's context or before its window is ever read: the KV cache may hold anything there. Import this
module only where triton is there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton

from pdlaunch.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.models.attention import AttentionBackend, AttentionStep
from pdlaunch.models.attention_kernels import (
    attend_chunks,
    attend_decode,
    gather_kv,
    reduce_splits,
    write_kv,
)
from pdlaunch.models.layer_kernels import rotate_and_write
from pdlaunch.models.packed import IntArray, PackedBatch
from pdlaunch.models.prompt_attention import (
    CUDNN_MAX_HEAD_DIM,
    CUDNN_PLANNED_TOKENS,
    CUDNN_STEP_TOKENS,
    FLASH_MAX_HEAD_DIM,
    attend_whole_prompts,
    attend_with_cudnn,
    has_fast_cudnn,
    varlen_flash,
)
from pdlaunch.models.step_inputs import DecodeInputs, slots_of, upload
from pdlaunch.models.triton_step import Chunks, HeadNorms, Prefix, SplitPlan, StepTensors

Progress = Callable[[str, float | None], None]

LOG2_E = 1.4426950408889634
MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""
COPY_TOKENS = 16
"""Tokens that one program writes or gathers, from more than ``FEW_TOKENS`` on."""
FEW_TOKENS = 32


class TritonAttention(AttentionBackend):
    """``kv_cache`` as ``KVCacheLayout`` says, contiguous; its dtype is that of the model."""

    reads_only_context = True

    def __init__(self, layout: KVCacheLayout, kv_cache: torch.Tensor) -> None:
        self.layout = layout
        self.kv_cache = kv_cache
        self.place = {
            layer: (index, slot)
            for index, group in enumerate(layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        self.padded_dim = max(MIN_DOT, triton.next_power_of_2(layout.head_dim))
        is_large = self.padded_dim * layout.dtype_bytes > 256
        self.tile = 32
        self.chunk_tokens = 16 if is_large else 64
        is_half = (
            kv_cache.is_cuda
            and kv_cache.dtype in (torch.float16, torch.bfloat16)
            and layout.head_dim % 8 == 0
        )
        self.flash = varlen_flash() if is_half and layout.head_dim <= FLASH_MAX_HEAD_DIM else None
        self.has_cudnn = (
            is_half and layout.head_dim <= CUDNN_MAX_HEAD_DIM and has_fast_cudnn(kv_cache.device)
        )

    def warm_up(self, num_heads: int, max_tokens: int, progress: Progress) -> None:
        """Let cuDNN plan for the lengths that prompts of up to ``max_tokens`` are padded to."""
        if not self.has_cudnn:
            return
        layout = self.layout
        longest = min(max_tokens, CUDNN_PLANNED_TOKENS)
        for num_tokens in range(CUDNN_STEP_TOKENS, longest + CUDNN_STEP_TOKENS, CUDNN_STEP_TOKENS):
            progress("preparing prefill attention", num_tokens / (longest + CUDNN_STEP_TOKENS))
            heads = self.kv_cache.new_zeros(
                (num_tokens, num_heads + 2 * layout.num_kv_heads, layout.head_dim)
            )
            attend_with_cudnn(heads, num_heads, 1.0)

    def prepare(self, batch: PackedBatch) -> TritonStep:
        """Everything the layers share, in one copy to the device."""
        slots = slots_of(batch.block_tables, batch, self.layout.block_size)
        stride = np.array([batch.block_tables[0].shape[1]])
        arrays = [stride, batch.context_lengths, np.stack(batch.block_tables), *slots]
        num_shared = len(arrays)
        has_chunks = batch.num_decode_rows < batch.num_rows
        gathered = self._gathered(batch) if has_chunks and self.flash is not None else []
        if has_chunks:
            arrays += [*self._chunk_arrays(batch), *(array for pair in gathered for array in pair)]
        stride_at, lengths, tables, *rest = upload(arrays, self.kv_cache.device)
        uploaded = rest[num_shared - 3 :]
        tensors = StepTensors(
            slots=tuple(rest[: num_shared - 3]),
            lengths=lengths,
            tables=tables,
            table_stride_at=stride_at,
            num_decode_rows=batch.num_decode_rows,
            chunks=self._chunks(batch, uploaded, gathered) if has_chunks else None,
        )
        return TritonStep(self, tensors)

    def decode_step(self, inputs: DecodeInputs) -> TritonStep:
        """A step over ``inputs`` that can be captured and replayed for whatever ``inputs`` are
        filled with.
        """
        tensors = StepTensors(
            slots=inputs.slots,
            lengths=inputs.lengths,
            tables=inputs.tables,
            table_stride_at=inputs.table_stride_at,
            num_decode_rows=inputs.num_rows,
            chunks=None,
        )
        return TritonStep(self, tensors)

    def _chunk_arrays(self, batch: PackedBatch) -> list[IntArray]:
        """starts, row_starts, tile_rows, tile_tokens"""
        starts = batch.row_starts[batch.num_decode_rows :] - batch.row_starts[batch.num_decode_rows]
        counts = -(-np.diff(starts) // self.chunk_tokens)
        tile_rows = np.repeat(np.arange(batch.num_decode_rows, batch.num_rows), counts)
        tile_tokens = np.concatenate([np.arange(count) for count in counts]) * self.chunk_tokens
        return [starts, batch.row_starts, tile_rows, tile_tokens]

    def _gathered(self, batch: PackedBatch) -> list[tuple[IntArray, IntArray]]:
        """By group: slots of all that the chunks see, and where each chunk's begin. Empty when
        there is nothing before any.
        """
        rows = np.arange(batch.num_decode_rows, batch.num_rows)
        lengths = batch.context_lengths[rows]
        before = lengths - np.diff(batch.row_starts)[rows]
        if not before.any():
            return []
        return [
            self._gathered_group(group, table[rows], before, lengths)
            for group, table in zip(self.layout.groups, batch.block_tables, strict=True)
        ]

    def _gathered_group(
        self, group: KVCacheGroup, table: IntArray, before: IntArray, lengths: IntArray
    ) -> tuple[IntArray, IntArray]:
        window, size = group.sliding_window, self.layout.block_size
        first = np.zeros_like(before) if window is None else np.maximum(before - window + 1, 0)
        starts = np.concatenate([[0], np.cumsum(lengths - first)])
        row = np.repeat(np.arange(len(lengths)), lengths - first)
        positions = np.arange(starts[-1]) - starts[row] + first[row]
        return table[row, positions // size] * size + positions % size, starts

    def _chunks(
        self,
        batch: PackedBatch,
        uploaded: list[torch.Tensor],
        gathered: list[tuple[IntArray, IntArray]],
    ) -> Chunks:
        starts, row_starts, tile_rows, tile_tokens, *pairs = uploaded
        prefixes = tuple(
            Prefix(pairs[2 * index], pairs[2 * index + 1], int(np.diff(group_starts).max()))
            for index, (_, group_starts) in enumerate(gathered)
        )
        lengths = np.diff(batch.row_starts)[batch.num_decode_rows :]
        fits_cudnn = self.has_cudnn and not prefixes and int(lengths.min()) >= CUDNN_STEP_TOKENS
        return Chunks(
            longest=int(lengths.max()),
            starts=starts,
            row_starts=row_starts,
            tile_rows=tile_rows,
            tile_tokens=tile_tokens,
            prefixes=prefixes or None,
            lengths=tuple(lengths.tolist()) if fits_cudnn else (),
        )


class TritonStep(AttentionStep):
    """One step; all tensors of it live on the device."""

    def __init__(self, backend: TritonAttention, tensors: StepTensors) -> None:
        self._backend = backend
        self._tensors = tensors
        self._block_stride, self._head_stride, self._layer_stride = backend.kv_cache.stride()[:3]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._write(layer, key, value)
        return self._attend(
            layer,
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            scaling,
            sinks=sinks,
        )

    def rotate_and_attend(
        self,
        layer: int,
        projected: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """As ``attend``, from queries, keys and values side by side: [num_tokens, (num_heads + 2 *
        H) * D], overwritten.

        ``rotary``: cosines and sines, [num_tokens, D] each; None: a layer without. ``norms`` are
        applied before the rotation.
        """
        layout = self._backend.layout
        num_tokens, head_dim, num_kv_heads = len(projected), layout.head_dim, layout.num_kv_heads
        num_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
        cosines, sines = rotary or (projected, projected)
        applied = norms or HeadNorms(projected, projected, 0.0)
        tokens = COPY_TOKENS if num_tokens > FEW_TOKENS else 1
        rotate_and_write[(triton.cdiv(num_tokens, tokens), num_heads + 2 * num_kv_heads)](
            projected,
            cosines,
            sines,
            applied.query,
            applied.key,
            self._slots(layer),
            self._backend.kv_cache,
            num_tokens,
            projected.stride(0),
            cosines.stride(0),
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            applied.epsilon,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=head_dim,
            PADDED_HALF=triton.next_power_of_2(head_dim // 2),
            TOKENS=tokens,
            HAS_NORMS=norms is not None,
            NORM_OFFSET=applied.offset,
            ROTATES=rotary is not None,
        )
        heads = projected.view(num_tokens, -1, head_dim)
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        return self._attend(layer, query, key, value, scaling, stacked=heads)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        layout, num_tokens = self._backend.layout, key.shape[1]
        tokens = COPY_TOKENS if num_tokens > FEW_TOKENS else 1
        write_kv[(triton.cdiv(num_tokens, tokens), layout.num_kv_heads)](
            key,
            value,
            self._slots(layer),
            self._backend.kv_cache,
            num_tokens,
            key.stride(1),
            key.stride(0),
            value.stride(1),
            value.stride(0),
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=layout.head_dim,
            PADDED_DIM=self._backend.padded_dim,
            TOKENS=tokens,
        )

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        *,
        sinks: torch.Tensor | None = None,
        stacked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All [num_tokens, heads, D]; keys and values are in the KV cache already. ``stacked``: all
        three along dimension 1.
        """
        num_rows, chunks = self._tensors.num_decode_rows, self._tensors.chunks
        has_flash = self._backend.flash is not None and sinks is None
        if chunks is not None and has_flash and not num_rows:
            return self._flash_chunks(layer, chunks, query, key, value, scaling, stacked)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if num_rows:
            self._attend_decode(layer, query[:num_rows], result[:num_rows], scaling, sinks)
        if chunks is None:
            return result
        if has_flash:
            result[num_rows:] = self._flash_chunks(
                layer,
                chunks,
                query[num_rows:],
                key[num_rows:],
                value[num_rows:],
                scaling,
                None if stacked is None else stacked[num_rows:],
            )
        else:
            self._attend_chunks(layer, chunks, query, result, scaling, sinks)
        return result

    def _attend_decode(
        self,
        layer: int,
        query: torch.Tensor,
        result: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        backend, layout = self._backend, self._backend.layout
        num_rows, num_heads, head_dim = query.shape
        plan = SplitPlan.of(num_rows, layout.num_kv_heads)
        share = num_heads // layout.num_kv_heads
        partials = query.new_empty(
            (num_rows * num_heads * plan.num_splits, head_dim), dtype=torch.float32
        )
        scales = query.new_empty((2, len(partials)), dtype=torch.float32)
        window = layout.groups[backend.place[layer][0]].sliding_window or 0
        attend_decode[(num_rows, layout.num_kv_heads, plan.num_splits)](
            query,
            backend.kv_cache,
            self._tensors.tables,
            self._tensors.table_stride_at,
            self._tensors.lengths,
            partials,
            scales[0],
            scales[1],
            self._table_row(layer),
            scaling * LOG2_E,
            query.stride(0),
            query.stride(1),
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            NUM_SPLITS=plan.num_splits,
            MIN_SPLIT=plan.min_tokens,
            GROUP=share,
            PADDED_GROUP=max(MIN_DOT, triton.next_power_of_2(share)),
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=backend.padded_dim,
            TILE=backend.tile,
            WINDOW=window,
            num_warps=4,
            num_stages=2,
        )
        reduce_splits[(num_rows, num_heads)](
            partials,
            scales[0],
            scales[1],
            self._tensors.lengths,
            scales if sinks is None else sinks,
            result,
            NUM_SPLITS=plan.num_splits,
            MIN_SPLIT=plan.min_tokens,
            HEAD_DIM=head_dim,
            PADDED_DIM=backend.padded_dim,
            TILE=backend.tile,
            WINDOW=window,
            HAS_SINKS=sinks is not None,
            num_warps=max(1, plan.num_splits // 8),
        )

    def _attend_chunks(
        self,
        layer: int,
        chunks: Chunks,
        query: torch.Tensor,
        result: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        backend, layout = self._backend, self._backend.layout
        attend_chunks[(len(chunks.tile_rows), query.shape[1])](
            query,
            backend.kv_cache,
            self._tensors.tables,
            self._tensors.table_stride_at,
            self._tensors.lengths,
            chunks.row_starts,
            chunks.tile_rows,
            chunks.tile_tokens,
            query if sinks is None else sinks,
            result,
            self._table_row(layer),
            scaling * LOG2_E,
            query.stride(0),
            query.stride(1),
            result.stride(0),
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            GROUP=query.shape[1] // layout.num_kv_heads,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=layout.head_dim,
            PADDED_DIM=backend.padded_dim,
            TOKENS=backend.chunk_tokens,
            TILE=backend.tile,
            WINDOW=layout.groups[backend.place[layer][0]].sliding_window or 0,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            num_stages=2,
        )

    def _flash_chunks(
        self,
        layer: int,
        chunks: Chunks,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        stacked: torch.Tensor | None,
    ) -> torch.Tensor:
        """Everything [num_tokens of chunks, heads, D]."""
        assert self._backend.flash is not None
        index, _ = self._backend.place[layer]
        window = self._backend.layout.groups[index].sliding_window
        if chunks.lengths and (window is None or window >= chunks.longest):
            stacked = torch.cat((query, key, value), dim=1) if stacked is None else stacked
            return attend_whole_prompts(chunks.lengths, stacked, query.shape[1], scaling)
        key_starts, longest_key = chunks.starts, chunks.longest
        if chunks.prefixes is not None:
            prefix = chunks.prefixes[index]
            key, value = self._gather(layer, prefix)
            key_starts, longest_key = prefix.starts, prefix.longest
        return self._backend.flash(
            query,
            key,
            value,
            chunks.starts,
            key_starts,
            chunks.longest,
            longest_key,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
        )

    def _gather(self, layer: int, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
        backend, layout, num_tokens = self._backend, self._backend.layout, len(prefix.slots)
        gathered = backend.kv_cache.new_empty((2, num_tokens, layout.num_kv_heads, layout.head_dim))
        gather_kv[(triton.cdiv(num_tokens, COPY_TOKENS), layout.num_kv_heads)](
            backend.kv_cache,
            prefix.slots,
            gathered[0],
            gathered[1],
            num_tokens,
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=layout.head_dim,
            PADDED_DIM=backend.padded_dim,
            TOKENS=COPY_TOKENS,
        )
        return gathered[0], gathered[1]

    def _slots(self, layer: int) -> torch.Tensor:
        return self._tensors.slots[self._backend.place[layer][0]]

    def _table_row(self, layer: int) -> int:
        """First row of the layer's group in ``tables``."""
        return self._backend.place[layer][0] * len(self._tensors.lengths)

    def _layer_offset(self, layer: int) -> int:
        return self._backend.place[layer][1] * self._layer_stride
