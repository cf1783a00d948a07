"""Paged attention on CUDA devices: Triton kernels, and libraries for prompts in 16 bits.

Decode reads the KV cache in place, in splits of the context. Whole prompts go through cuDNN where
it is faster; other chunks through flash attention, with what lies before them gathered into
contiguous memory; in float32, and where heads have sinks, through a Triton kernel. Nothing past a
row's context or before its window is ever read: the KV cache may hold anything there. Import this
module only where triton is there.
"""

from __future__ import annotations

import numpy as np
import torch

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.models.attention import AttentionBackend, IntArray, PackedBatch, ReportProgress
from pdlaunch.engine.models.step_inputs import (
    Chunks,
    GraphInputs,
    LibraryChunks,
    Prefix,
    StepTensors,
    slots_of,
    tiles_of,
    upload_int32,
)
from pdlaunch.engine.models.triton_step import (
    CUDNN_MAX_HEAD_DIM,
    CUDNN_PLANNED_TOKENS,
    CUDNN_STEP_TOKENS,
    FLASH_MAX_HEAD_DIM,
    KernelSetup,
    TritonStep,
    attend_with_cudnn,
    has_fast_cudnn,
    varlen_flash,
)


class TritonAttention(AttentionBackend):
    """Prepares steps on a CUDA device; ``TritonStep`` runs them."""

    reads_only_context = True

    def __init__(self, layout: KVCacheLayout, kv_cache: torch.Tensor) -> None:
        """Choose kernels. ``kv_cache``: as ``layout`` says, contiguous; its dtype is that of the
        model.
        """
        is_half = (
            kv_cache.is_cuda
            and kv_cache.dtype in (torch.float16, torch.bfloat16)
            and layout.head_dim % 8 == 0
        )
        has_flash = is_half and layout.head_dim <= FLASH_MAX_HEAD_DIM
        self.setup = KernelSetup(layout, kv_cache, flash=varlen_flash() if has_flash else None)
        self._has_cudnn = (
            is_half and layout.head_dim <= CUDNN_MAX_HEAD_DIM and has_fast_cudnn(kv_cache.device)
        )

    def warm_up(self, num_heads: int, max_tokens: int, progress: ReportProgress) -> None:
        """Let cuDNN plan for the lengths that prompts of up to ``max_tokens`` are padded to."""
        if not self._has_cudnn:
            return
        layout = self.setup.layout
        longest = min(max_tokens, CUDNN_PLANNED_TOKENS)
        for num_tokens in range(CUDNN_STEP_TOKENS, longest + CUDNN_STEP_TOKENS, CUDNN_STEP_TOKENS):
            progress("preparing prefill attention", num_tokens / (longest + CUDNN_STEP_TOKENS))
            heads = self.setup.kv_cache.new_zeros(
                (num_tokens, num_heads + 2 * layout.num_kv_heads, layout.head_dim)
            )
            attend_with_cudnn(heads, num_heads, 1.0)

    def prepare(self, batch: PackedBatch) -> TritonStep:
        """Copy all that the layers share to the device at once."""
        slots = slots_of(batch.block_tables, batch, self.setup.layout.block_size)
        stride = np.array([batch.block_tables[0].shape[1]])
        arrays = [stride, batch.context_lengths, np.stack(batch.block_tables), *slots]
        num_shared = len(arrays)
        has_chunks = batch.num_decode_rows < batch.num_rows
        gathered = self._gathered(batch) if has_chunks and self.setup.flash is not None else []
        if has_chunks:
            starts = batch.row_starts[batch.num_decode_rows :]
            tiles = tiles_of(batch, self.setup.chunk_tokens)
            arrays += [batch.row_starts, *tiles, starts - starts[0]]
            arrays += [array for pair in gathered for array in pair]
        stride_at, lengths, tables, *rest = upload_int32(arrays, self.setup.kv_cache.device)
        # ``rest``: the slots of each group; then, with chunks, their four arrays and two more for
        # each group that is gathered.
        uploaded = rest[num_shared - 3 :]
        tensors = StepTensors(
            slots=tuple(rest[: num_shared - 3]),
            lengths=lengths,
            num_decode_rows=batch.num_decode_rows,
            tables=tables,
            table_stride_at=stride_at,
            chunks=self._chunks(batch, uploaded, gathered) if has_chunks else None,
        )
        return TritonStep(self.setup, tensors)

    def graph_step(self, inputs: GraphInputs) -> TritonStep:
        """Return a step over ``inputs`` that a graph can replay, whatever they are filled with
        then.
        """
        return TritonStep(self.setup, inputs.tensors)

    def _gathered(self, batch: PackedBatch) -> list[tuple[IntArray, IntArray]]:
        """Return by group the slots of all that chunks see, and where each chunk's begin.

        Empty when there is nothing before any chunk.
        """
        rows = np.arange(batch.num_decode_rows, batch.num_rows)
        lengths = batch.context_lengths[rows]
        before = lengths - np.diff(batch.row_starts)[rows]
        if not before.any():
            return []
        return [
            self._gathered_group(group, table[rows], before, lengths)
            for group, table in zip(self.setup.layout.groups, batch.block_tables, strict=True)
        ]

    def _gathered_group(
        self, group: KVCacheGroup, table: IntArray, before: IntArray, lengths: IntArray
    ) -> tuple[IntArray, IntArray]:
        window, size = group.sliding_window, self.setup.layout.block_size
        first = np.zeros_like(before) if window is None else np.maximum(before - window + 1, 0)
        # A row contributes its tokens [first, length); the first query, at ``before``, sees none
        # earlier.
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
        row_starts, tile_rows, tile_tokens, starts, *pairs = uploaded
        if self.setup.flash is None:
            return Chunks(row_starts, tile_rows, tile_tokens, library=None)
        prefixes = tuple(
            Prefix(pairs[2 * index], pairs[2 * index + 1], int(np.diff(group_starts).max()))
            for index, (_, group_starts) in enumerate(gathered)
        )
        lengths = np.diff(batch.row_starts)[batch.num_decode_rows :]
        fits_cudnn = self._has_cudnn and not prefixes and int(lengths.min()) >= CUDNN_STEP_TOKENS
        library = LibraryChunks(
            longest=int(lengths.max()),
            starts=starts,
            prefixes=prefixes or None,
            lengths=tuple(lengths.tolist()) if fits_cudnn else (),
        )
        return Chunks(row_starts, tile_rows, tile_tokens, library)
