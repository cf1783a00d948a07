"""One step of ``TritonAttention``: it launches the kernels of each layer.

They read the KV cache in place and cut contexts of decode rows into splits, so that few long rows
fill the device too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models.attention import AttentionStep
from pdlaunch.engine.models.attention_kernels import (
    LOG2_E,
    attend_chunks,
    attend_decode,
    gather_kv,
    reduce_splits,
    write_kv,
)
from pdlaunch.engine.models.layer_kernels import rotate_and_write
from pdlaunch.engine.models.step_inputs import Chunks, LibraryChunks, Prefix, StepTensors

TARGET_PROGRAMS = 1024  # programs that fill the device: eight for each of an H200's multiprocessors
MAX_SPLITS = 32
MIN_DOT = 16  # smallest side of a matrix product in Triton


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Says how kernels cut contexts; fixed at launch, whatever the lengths are."""

    num_splits: int  # most splits of a row; a power of two
    min_tokens: int

    @staticmethod
    def of(num_rows: int, num_kv_heads: int) -> SplitPlan:
        """Cut few rows into many splits; cut rows that fill the device only where they are long."""
        wanted = -(-TARGET_PROGRAMS // (num_rows * num_kv_heads))
        min_tokens = 1024 if wanted == 1 else 256 if wanted <= 4 else 32
        return SplitPlan(min(MAX_SPLITS, max(8, triton.next_power_of_2(wanted))), min_tokens)


@dataclass(slots=True)
class KernelSetup:
    """Holds what all steps of a backend share: the KV cache, and the sizes of kernels' tiles."""

    layout: KVCacheLayout
    kv_cache: torch.Tensor
    """Laid out as ``layout`` says, contiguous; its dtype is that of the model."""
    flash: Callable[..., torch.Tensor] | None
    """torch's varlen attention; None where it does not fit."""
    place: dict[int, tuple[int, int]] = field(init=False)
    """The group of each layer, and the layer's slot in the group's blocks."""
    padded_dim: int = field(init=False)
    tile: int = 32  # positions that a program of decode reads at a time
    chunk_tokens: int = field(init=False)
    chunk_tile: int = field(init=False)  # the same of chunks

    def __post_init__(self) -> None:
        self.place = {
            layer: (index, slot)
            for index, group in enumerate(self.layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        self.padded_dim = max(MIN_DOT, triton.next_power_of_2(self.layout.head_dim))
        is_large = self.padded_dim * self.layout.dtype_bytes > 256
        self.chunk_tokens, self.chunk_tile = (16, 32) if is_large else (64, 64)


FLASH_MAX_HEAD_DIM = 256
CUDNN_MAX_HEAD_DIM = 128
CUDNN_CAPABILITY = 9
"""cuDNN's attention is twice as fast as torch's flash attention from Hopper on (measured)."""
CUDNN_PLANNED_TOKENS = 8192
"""Prompts up to this length have their plans from the start on. Of longer ones, the first of each
length waits for its plan.
"""
CUDNN_STEP_TOKENS = 512
"""Prompts are padded to multiples of this: cuDNN takes 45 ms to plan for a length that it has not
met.
"""


def attend_whole_prompts(
    lengths: tuple[int, ...], stacked: torch.Tensor, num_heads: int, scaling: float
) -> torch.Tensor:
    """Attend over prompts of these lengths, one after another in ``stacked``.

    Padding comes after all that a token sees.
    """
    results, start = [], 0
    for length in lengths:
        heads = stacked[start : start + length]
        if padding := -length % CUDNN_STEP_TOKENS:
            heads = stacked.new_empty((length + padding, *stacked.shape[1:]))
            heads[:length] = stacked[start : start + length]
            heads[length:] = 0
        # Attention is causal: no token sees the padding behind it, whose own results are cut off.
        results.append(attend_with_cudnn(heads, num_heads, scaling)[:length])
        start += length
    return results[0] if len(results) == 1 else torch.cat(results)


def attend_with_cudnn(heads: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor:
    """Return the causal attention of one prompt: [num_tokens, num_heads, D].

    ``heads``: [num_tokens, num_heads + 2 * H, D]; queries, keys, values. They are always laid out
    like this, as cuDNN plans by strides too.
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


def has_fast_cudnn(device: torch.device) -> bool:
    """Return whether cuDNN's attention is the faster one on ``device``."""
    has_cudnn: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return has_cudnn and torch.cuda.get_device_capability(device)[0] >= CUDNN_CAPABILITY


def varlen_flash() -> Callable[..., torch.Tensor]:
    """Return torch's varlen attention, which from 2.12 on is told that query heads share keys."""
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend: Any = varlen_attn  # returns a tuple only where more is asked for
    return partial(attend, enable_gqa=True) if knows_groups else attend


COPY_TOKENS = 16  # tokens that one program writes or gathers, from more than ``FEW_TOKENS`` on
FEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Holds the RMS norms of a layer's queries and keys."""

    query: torch.Tensor  # [D]
    key: torch.Tensor  # [D]
    epsilon: float
    offset: int = 0  # added to all weights


class TritonStep(AttentionStep):
    """Launches the kernels of one step, layer by layer; all its tensors live on the device."""

    def __init__(self, setup: KernelSetup, tensors: StepTensors) -> None:
        self._setup = setup
        self._tensors = tensors
        self._block_stride, self._head_stride, self._layer_stride = setup.kv_cache.stride()[:3]

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
        """Do as ``attend``, from queries, keys and values that lie side by side.

        ``projected``: [num_tokens, (num_heads + 2 * H) * D], overwritten. ``rotary``: cosines and
        sines, [num_tokens, D] each; None: a layer without. ``norms`` are applied before the
        rotation.
        """
        layout = self._setup.layout
        num_tokens, head_dim, num_kv_heads = len(projected), layout.head_dim, layout.num_kv_heads
        num_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
        # The kernel takes pointers in any case, and reads none that its constants switch off.
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
            self._setup.kv_cache,
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
        layout, num_tokens = self._setup.layout, key.shape[1]
        tokens = COPY_TOKENS if num_tokens > FEW_TOKENS else 1
        write_kv[(triton.cdiv(num_tokens, tokens), layout.num_kv_heads)](
            key,
            value,
            self._slots(layer),
            self._setup.kv_cache,
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
            PADDED_DIM=self._setup.padded_dim,
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
        """Attend over keys and values that are in the KV cache already.

        All are [num_tokens, heads, D]; ``stacked`` holds all three along dimension 1.
        """
        num_rows, chunks = self._tensors.num_decode_rows, self._tensors.chunks
        library = None if chunks is None or sinks is not None else chunks.library
        if library is not None and not num_rows:
            return self._library_chunks(layer, library, query, key, value, scaling, stacked)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if num_rows:
            self._attend_decode(layer, query[:num_rows], result[:num_rows], scaling, sinks)
        if library is not None:
            result[num_rows:] = self._library_chunks(
                layer,
                library,
                query[num_rows:],
                key[num_rows:],
                value[num_rows:],
                scaling,
                None if stacked is None else stacked[num_rows:],
            )
        elif chunks is not None:
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
        setup, layout = self._setup, self._setup.layout
        num_rows, num_heads, head_dim = query.shape
        plan = SplitPlan.of(num_rows, layout.num_kv_heads)
        share = num_heads // layout.num_kv_heads
        partials = query.new_empty(
            (num_rows * num_heads * plan.num_splits, head_dim), dtype=torch.float32
        )
        scales = query.new_empty((2, len(partials)), dtype=torch.float32)
        window = layout.groups[setup.place[layer][0]].sliding_window or 0
        attend_decode[(num_rows, layout.num_kv_heads, plan.num_splits)](
            query,
            setup.kv_cache,
            self._tensors.tables,
            self._tensors.table_stride_at,
            self._tensors.lengths,
            partials,
            scales[0],
            scales[1],
            self._table_row(layer),
            scaling * LOG2_E.value,
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
            PADDED_DIM=setup.padded_dim,
            TILE=setup.tile,
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
            PADDED_DIM=setup.padded_dim,
            TILE=setup.tile,
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
        setup, layout = self._setup, self._setup.layout
        _num_tokens, num_heads, head_dim = query.shape
        attend_chunks[(len(chunks.tile_rows), num_heads)](
            query,
            setup.kv_cache,
            self._tensors.tables,
            self._tensors.table_stride_at,
            self._tensors.lengths,
            chunks.row_starts,
            chunks.tile_rows,
            chunks.tile_tokens,
            query if sinks is None else sinks,
            result,
            self._table_row(layer),
            scaling * LOG2_E.value,
            query.stride(0),
            query.stride(1),
            result.stride(0),
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            GROUP=num_heads // layout.num_kv_heads,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=setup.padded_dim,
            TOKENS=setup.chunk_tokens,
            TILE=setup.chunk_tile,
            WINDOW=layout.groups[setup.place[layer][0]].sliding_window or 0,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            num_stages=2,
        )

    def _library_chunks(
        self,
        layer: int,
        chunks: LibraryChunks,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        stacked: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with libraries. All are [num_tokens of chunks, heads, D]; ``stacked`` as above."""
        assert self._setup.flash is not None
        index, _ = self._setup.place[layer]
        window = self._setup.layout.groups[index].sliding_window
        # Whole prompts that fit into the window go to cuDNN, which wants all three side by side.
        if chunks.lengths and (window is None or window >= chunks.longest):
            stacked = torch.cat((query, key, value), dim=1) if stacked is None else stacked
            return attend_whole_prompts(chunks.lengths, stacked, query.shape[1], scaling)
        key_starts, longest_key = chunks.starts, chunks.longest
        if chunks.prefixes is not None:
            prefix = chunks.prefixes[index]
            key, value = self._gather(layer, prefix)
            key_starts, longest_key = prefix.starts, prefix.longest
        return self._setup.flash(
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
        setup, layout, num_tokens = self._setup, self._setup.layout, len(prefix.slots)
        gathered = setup.kv_cache.new_empty((2, num_tokens, layout.num_kv_heads, layout.head_dim))
        gather_kv[(triton.cdiv(num_tokens, COPY_TOKENS), layout.num_kv_heads)](
            setup.kv_cache,
            prefix.slots,
            gathered[0],
            gathered[1],
            num_tokens,
            self._layer_offset(layer),
            self._block_stride,
            self._head_stride,
            BLOCK_SIZE=layout.block_size,
            HEAD_DIM=layout.head_dim,
            PADDED_DIM=setup.padded_dim,
            TOKENS=COPY_TOKENS,
        )
        return gathered[0], gathered[1]

    def _slots(self, layer: int) -> torch.Tensor:
        return self._tensors.slots[self._setup.place[layer][0]]

    def _table_row(self, layer: int) -> int:
        """Return the first row of the layer's group in ``tables``."""
        return self._setup.place[layer][0] * len(self._tensors.lengths)

    def _layer_offset(self, layer: int) -> int:
        return self._setup.place[layer][1] * self._layer_stride
