"""Paged attention on CUDA devices: Triton kernels for decode, libraries for prompts.

Decode reads the KV cache in place and splits the context, so that a few long rows also fill the
device. Whole prompts use cuDNN if it is faster. Other chunks use flash attention, or in float32
other kernels of torch, with the context gathered into contiguous memory. Slots past a row's context
or before its window are never read: they may hold any bytes. Import this module only if triton is
installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models import kernels
from pdlaunch.engine.models.attention import (
    AttentionBackend,
    AttentionStep,
    IntArray,
    PackedBatch,
    ReportProgress,
)
from pdlaunch.engine.models.step_inputs import StepTensors, slots_of, upload_int32

FLASH_MAX_HEAD_DIM = 256
CUDNN_MAX_HEAD_DIM = 128
# From Hopper on, cuDNN's attention is twice as fast as torch's flash attention (measured).
CUDNN_CAPABILITY = 9
# The start plans for prompts up to this length. A longer prompt waits for its plan.
CUDNN_PLANNED_TOKENS = 8192
# Prompts are padded to multiples of this, because cuDNN needs 45 ms to plan for a new length.
CUDNN_STEP_TOKENS = 512


def attend_whole_prompts(
    lengths: list[int], stacked: torch.Tensor, num_heads: int, scaling: float
) -> torch.Tensor:
    """Attend over prompts of these lengths, which follow each other in ``stacked``."""
    results = []
    for heads in torch.split(stacked, lengths):
        length = len(heads)
        if padding := -length % CUDNN_STEP_TOKENS:
            padded = stacked.new_empty((length + padding, *stacked.shape[1:]))
            padded[:length] = heads
            padded[length:] = 0
            heads = padded
        # Attention is causal, so no token sees the padding. The padding's results are cut off.
        results.append(attend_with_cudnn(heads, num_heads, scaling)[:length])
    return results[0] if len(results) == 1 else torch.cat(results)


def attend_with_cudnn(heads: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor:
    """Return the causal attention of one prompt, [num_tokens, num_heads, D]. ``heads``: queries,
    keys, values, [num_tokens, num_heads + 2 * H, D], always in this layout, because a plan of cuDNN
    is for certain strides.
    """
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    query, key, value = torch.split(
        heads.transpose(0, 1)[None], [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    return attended[0].transpose(0, 1)


def varlen_flash() -> Callable[..., torch.Tensor]:
    """Return torch's varlen attention, with ``enable_gqa`` from torch 2.12 on."""
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend: Any = varlen_attn  # returns a tuple only if more results are requested
    return partial(attend, enable_gqa=True) if knows_groups else attend


def attend_by_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    _longest: int,
    _longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """As torch's varlen attention, chunk by chunk, for dtypes and heads that it does not take."""
    share, results = query.shape[1] // key.shape[1], []
    own, held = starts.diff().tolist(), key_starts.diff().tolist()
    parts = torch.split(query, own), torch.split(key, held), torch.split(value, held)
    for queries, keys, values in zip(*parts, strict=True):
        # The last query of a chunk sees its last key; the window is of earlier keys.
        seen = torch.arange(len(keys), device=query.device)
        places = seen[len(keys) - len(queries) :, None]
        visible = (seen <= places) & ((seen >= places - window_size[0]) | (window_size[0] < 0))
        attended = scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            # Repeated, because torch's kernels for masks take no groups of query heads.
            keys.repeat_interleave(share, 1).transpose(0, 1)[None],
            values.repeat_interleave(share, 1).transpose(0, 1)[None],
            attn_mask=visible,
            scale=scale,
        )
        results.append(attended[0].transpose(0, 1))
    return torch.cat(results)


TARGET_PROGRAMS = 1024  # programs that fill the device: eight for each multiprocessor of an H200
MAX_SPLITS = 32
MIN_DOT = 16  # smallest side of a matrix product in Triton
DECODE_TILE = 32  # positions that a decode program reads at a time
COPY_TOKENS = 16  # tokens that a program writes or gathers, if there are more than ``FEW_TOKENS``
FEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Norm:
    """The weights of an RMS norm."""

    weight: torch.Tensor  # [size]
    epsilon: float
    offset: int = 0  # added to all weights


@dataclass(frozen=True, slots=True)
class _LayerCache:
    """The place of a layer's keys and values in the KV cache."""

    group: int
    window: int  # 0: none
    cache: torch.Tensor  # a view of the KV cache that begins at the layer's keys in the first block


@dataclass(frozen=True, slots=True)
class _Heads:
    """Inputs of a layer's attention in a step. Each is [num_tokens, heads, D]."""

    layer: _LayerCache
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    stacked: torch.Tensor | None = None  # all three in one tensor, along dimension 1


class TritonAttention(AttentionBackend):
    """Prepares steps on a CUDA device; ``TritonStep`` runs them. ``kv_cache`` is contiguous."""

    reads_only_context = True

    def __init__(self, layout: KVCacheLayout, kv_cache: torch.Tensor) -> None:
        self.layout = layout
        self.kv_cache = kv_cache
        self.layers = {
            layer: _LayerCache(index, group.sliding_window or 0, kv_cache[:, :, slot:])
            for index, group in enumerate(layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        padded_dim = max(MIN_DOT, triton.next_power_of_2(layout.head_dim))
        # Arguments for all kernels that read or write the KV cache.
        self.cache_shape = {
            "block_stride": kv_cache.stride(0),
            "head_stride": kv_cache.stride(1),
            "BLOCK_SIZE": layout.block_size,
            "HEAD_DIM": layout.head_dim,
            "PADDED_DIM": padded_dim,
        }
        is_half = (
            kv_cache.is_cuda
            and kv_cache.dtype in (torch.float16, torch.bfloat16)
            and layout.head_dim % 8 == 0
        )
        takes_flash = is_half and layout.head_dim <= FLASH_MAX_HEAD_DIM
        # Torch's varlen attention, if it supports this dtype and head size
        self.flash: Callable[..., torch.Tensor] = varlen_flash() if takes_flash else attend_by_mask
        self._has_cudnn = (
            is_half
            and layout.head_dim <= CUDNN_MAX_HEAD_DIM
            and bool(torch.backends.cudnn.is_available())  # type: ignore[no-untyped-call]
            and torch.cuda.get_device_capability(kv_cache.device)[0] >= CUDNN_CAPABILITY
        )

    def warm_up(self, num_heads: int, max_tokens: int, progress: ReportProgress) -> None:
        """Let cuDNN plan for all padded lengths of prompts of up to ``max_tokens``."""
        if not self._has_cudnn:
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
        """Copy the inputs that all layers share to the device, in one transfer."""
        arrays: dict[str, IntArray | list[IntArray]] = {
            "slots": slots_of(batch, self.layout.block_size),
            "lengths": batch.context_lengths,
            "tables": np.stack(batch.block_tables),
            "table_stride_at": np.array([batch.block_tables[0].shape[1]]),
        }
        starts = batch.row_starts[batch.num_decode_rows :]
        prefixes: list[tuple[IntArray, IntArray]] = []
        if len(starts) > 1:
            arrays["chunk_starts"] = starts - starts[0]
            prefixes = self._prefixes(batch)
            arrays["prefix_slots"] = [slots for slots, _ in prefixes]
            arrays["prefix_starts"] = [prefix_starts for _, prefix_starts in prefixes]
        tensors = StepTensors(
            num_decode_rows=batch.num_decode_rows,
            chunk_lengths=np.diff(starts).tolist(),
            longest_prefixes=[int(np.diff(prefix_starts).max()) for _, prefix_starts in prefixes],
            **upload_int32(arrays, self.kv_cache.device),
        )
        return TritonStep(self, tensors)

    def graph_step(self, tensors: StepTensors) -> TritonStep:
        """Return a step that a CUDA graph can replay with any content of ``tensors``."""
        return TritonStep(self, tensors)

    def takes_cudnn(self, step: StepTensors, window: int) -> bool:
        """Return True if cuDNN attends: for long whole prompts that fit into the window."""
        return (
            self._has_cudnn
            and not step.prefix_slots
            and min(step.chunk_lengths) >= CUDNN_STEP_TOKENS
            and (not window or window >= max(step.chunk_lengths))
        )

    def _prefixes(self, batch: PackedBatch) -> list[tuple[IntArray, IntArray]]:
        """Return for each group the slots of the tokens that chunks see, and where those of each
        chunk begin. Empty if all chunks begin their prompts.
        """
        rows = np.arange(batch.num_decode_rows, batch.num_rows)
        lengths, size = batch.context_lengths[rows], self.layout.block_size
        before = lengths - np.diff(batch.row_starts)[rows]
        if not before.any():
            return []
        prefixes = []
        for group, table in zip(self.layout.groups, batch.block_tables, strict=True):
            # A row contributes its tokens [first, length). Its first query, at ``before``, does not
            # see earlier tokens.
            window = group.sliding_window
            first = np.zeros_like(before) if window is None else np.maximum(before - window + 1, 0)
            starts = np.concatenate([[0], np.cumsum(lengths - first)])
            row = np.repeat(np.arange(len(rows)), lengths - first)
            positions = np.arange(starts[-1]) - starts[row] + first[row]
            blocks = table[rows[row], positions // size]
            prefixes.append((blocks * size + positions % size, starts))
        return prefixes


def split_contexts(num_rows: int, num_kv_heads: int) -> tuple[int, int]:
    """Return the largest number of splits of a row, a power of two, and the fewest tokens of a
    split. A few rows get many splits; of many rows, only long ones are split. Neither number
    depends on the lengths, because a CUDA graph fixes both.
    """
    wanted = -(-TARGET_PROGRAMS // (num_rows * num_kv_heads))
    min_tokens = 1024 if wanted == 1 else 256 if wanted <= 4 else 32
    return min(MAX_SPLITS, max(8, triton.next_power_of_2(wanted))), min_tokens


class TritonStep(AttentionStep):
    """Launches the kernels of one step, layer by layer. All tensors are on the device."""

    def __init__(self, backend: TritonAttention, tensors: StepTensors) -> None:
        self._backend = backend
        self._tensors = tensors

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))
        place = self._backend.layers[layer]
        self._rotate_and_write(place, key, value, None, None)
        return self._attend(_Heads(place, query, key, value, scaling))

    def rotate_and_attend(
        self,
        layer: int,
        projected: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        norms: tuple[Norm, Norm] | None = None,
    ) -> torch.Tensor:
        """Like ``attend``, but normalize (``norms``: for queries and keys) and rotate (``rotary``:
        cosines and sines, each [num_tokens, D]) queries and keys first. ``projected``: [num_tokens,
        (num_heads + 2 * H) * D], queries, keys, values; overwritten.
        """
        layout, place = self._backend.layout, self._backend.layers[layer]
        heads = projected.view(len(projected), -1, layout.head_dim)
        num_kv_heads = layout.num_kv_heads
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        self._rotate_and_write(place, heads[:, : num_heads + num_kv_heads], value, rotary, norms)
        return self._attend(_Heads(place, query, key, value, scaling, stacked=heads))

    def _rotate_and_write(
        self,
        layer: _LayerCache,
        heads: torch.Tensor,
        values: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        norms: tuple[Norm, Norm] | None,
    ) -> None:
        """Normalize and rotate ``heads`` in place, then write keys and values into the KV cache.
        ``heads``: [num_tokens, heads, D], queries (perhaps none) and then keys.
        """
        num_tokens, num_heads_and_keys, _ = heads.shape
        num_kv_heads = values.shape[1]
        # The kernel needs a pointer for each argument, but reads only those that its constants
        # enable.
        cosines, sines = rotary or (heads, heads)
        query_norm, key_norm = norms or (Norm(heads, 0.0), Norm(heads, 0.0))
        tokens = COPY_TOKENS if num_tokens > FEW_TOKENS else 1
        kernels.rotate_and_write[
            (triton.cdiv(num_tokens, tokens), num_heads_and_keys + num_kv_heads)
        ](
            heads,
            values,
            cosines,
            sines,
            query_norm.weight,
            key_norm.weight,
            self._tensors.slots[layer.group],
            layer.cache,
            num_tokens,
            heads.stride(0),
            heads.stride(1),
            values.stride(0),
            values.stride(1),
            cosines.stride(0),
            query_norm.epsilon,
            NUM_HEADS=num_heads_and_keys - num_kv_heads,
            NUM_KV_HEADS=num_kv_heads,
            TOKENS=tokens,
            HAS_NORMS=norms is not None,
            NORM_OFFSET=query_norm.offset,
            ROTATES=rotary is not None,
            **self._backend.cache_shape,
        )

    def _attend(self, heads: _Heads) -> torch.Tensor:
        """Attend. The step's keys and values must be in the KV cache."""
        num_rows, query = self._tensors.num_decode_rows, heads.query
        if not num_rows:
            return self._attend_chunks(heads)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._attend_decode(heads, num_rows, result)
        if self._tensors.chunk_lengths:
            result[num_rows:] = self._attend_chunks(heads)
        return result

    def _attend_decode(self, heads: _Heads, num_rows: int, result: torch.Tensor) -> None:
        query, layer, layout = heads.query, heads.layer, self._backend.layout
        _, num_heads, head_dim = query.shape
        num_splits, min_split = split_contexts(num_rows, layout.num_kv_heads)
        share = num_heads // layout.num_kv_heads
        partials = query.new_empty(
            (num_rows * num_heads * num_splits, head_dim), dtype=torch.float32
        )
        scales = query.new_empty((2, len(partials)), dtype=torch.float32)
        kernels.attend_decode[(num_rows, layout.num_kv_heads, num_splits)](
            query,
            layer.cache,
            self._tensors.tables,
            self._tensors.table_stride_at,
            self._tensors.lengths,
            partials,
            scales[0],
            scales[1],
            layer.group * len(self._tensors.lengths),  # the group's first row in ``tables``
            heads.scaling * kernels.LOG2_E.value,
            query.stride(0),
            query.stride(1),
            NUM_SPLITS=num_splits,
            MIN_SPLIT=min_split,
            GROUP=share,
            PADDED_GROUP=max(MIN_DOT, triton.next_power_of_2(share)),
            TILE=DECODE_TILE,
            WINDOW=layer.window,
            num_warps=4,
            num_stages=2,
            **self._backend.cache_shape,
        )
        kernels.reduce_splits[(num_rows, num_heads)](
            partials,
            scales[0],
            scales[1],
            self._tensors.lengths,
            result,
            NUM_SPLITS=num_splits,
            MIN_SPLIT=min_split,
            HEAD_DIM=head_dim,
            PADDED_DIM=self._backend.cache_shape["PADDED_DIM"],
            TILE=DECODE_TILE,
            WINDOW=layer.window,
            num_warps=max(1, num_splits // 8),
        )

    def _attend_chunks(self, heads: _Heads) -> torch.Tensor:
        """Attend for the chunks with libraries. Return [num_tokens of chunks, num_heads, D]."""
        backend, layer, step = self._backend, heads.layer, self._tensors
        behind = slice(step.num_decode_rows, None)  # the tokens after the decode rows
        query, key, value = heads.query[behind], heads.key[behind], heads.value[behind]
        if backend.takes_cudnn(step, layer.window):
            # cuDNN needs all three in one tensor, as in its plans.
            if heads.stacked is None:
                stacked = torch.cat((query, key, value), dim=1)
            else:
                stacked = heads.stacked[behind]
            lengths = step.chunk_lengths
            return attend_whole_prompts(lengths, stacked, query.shape[1], heads.scaling)
        longest = max(step.chunk_lengths)
        key_starts, longest_key = step.chunk_starts, longest
        if step.prefix_slots:
            key, value = self._gather(layer, step.prefix_slots[layer.group])
            key_starts = step.prefix_starts[layer.group]
            longest_key = step.longest_prefixes[layer.group]
        return backend.flash(
            query,
            key,
            value,
            step.chunk_starts,
            key_starts,
            longest,
            longest_key,
            scale=heads.scaling,
            window_size=(layer.window - 1, 0),  # -1: none
        )

    def _gather(self, layer: _LayerCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values in ``slots``, each [num_slots, H, D]."""
        # For 32 layers of an 8B model on an H200: 1.1 ms up to 8,192 tokens and 2.3 at 32,768;
        # torch's indexing takes 3.3, 4.0 and 13.4.
        layout = self._backend.layout
        keys, values = layer.cache.new_empty((2, len(slots), layout.num_kv_heads, layout.head_dim))
        kernels.gather_kv[(triton.cdiv(len(slots), COPY_TOKENS), layout.num_kv_heads)](
            layer.cache,
            slots,
            keys,
            values,
            len(slots),
            TOKENS=COPY_TOKENS,
            **self._backend.cache_shape,
        )
        return keys, values
