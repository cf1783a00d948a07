"""Computes how many bytes a rank needs, from the shape of its model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.model_files.outline import KVLayers, Outline
from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape
from pdlaunch.config.sizes import format_size
from pdlaunch.engine.kvcache.groups import (
    KVCacheLayout,
    make_groups,
    min_blocks,
    num_kv_heads_of_rank,
)

# A rank that sizes its KV cache itself sets aside this times hidden plus inner size
CUDA_ACTIVATION_BYTES_PER_TOKEN = 64
_VLLM_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Footprint:
    """Holds the memory of one rank, in bytes; for vLLM, the least that it needs."""

    weight_bytes: int
    activation_bytes: int
    """Memory of the largest step; 0 for vLLM, where it is unknown.

    Set aside where the rank sizes its KV cache itself, else an estimate: hidden and inner states,
    float32 logits of every running request.
    """
    kv_bytes_for: Callable[[int], int]  # KV cache of one request, by its tokens
    max_model_len: int
    # Size of the KV cache; None: what the device has left, known only at start
    kv_cache_bytes: int | None
    layout: KVCacheLayout | None = None  # None: vLLM decides

    @property
    def num_blocks(self) -> int | None:
        """Return the KV blocks of the rank; None: known only at start."""
        if self.layout is None or self.kv_cache_bytes is None:
            return None
        return self.kv_cache_bytes // self.layout.block_bytes

    @property
    def min_kv_bytes(self) -> int:
        """Return the bytes of KV cache without which the longest request cannot run."""
        return self.kv_bytes_for(self.max_model_len)

    @property
    def kv_bytes(self) -> int:
        """Return the rank's KV cache in bytes; the least it needs where it takes what is left."""
        return self.min_kv_bytes if self.kv_cache_bytes is None else self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def longest_request_tokens(self, kv_bytes: int) -> int:
        """Return the longest request whose KV blocks fit into ``kv_bytes``; 0: none does."""
        size = self.layout.block_size if self.layout else _VLLM_BLOCK_SIZE
        # No request needs less than a shorter one, so that halving finds the last that fits.
        low, high = 0, math.ceil(self.max_model_len / size)
        while low < high:
            middle = (low + high + 1) // 2
            if self.kv_bytes_for(middle * size) <= kv_bytes:
                low = middle
            else:
                high = middle - 1
        return low * size

    def arithmetic(self) -> str:
        """Return the sum in words.

        Example: ``weights 1.2 GiB + activations 30 MiB + KV cache 1 GiB = 2.2 GiB``.
        """
        parts = {"weights": self.weight_bytes, "activations": self.activation_bytes}
        known = " + ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        kv, total = format_size(self.kv_bytes), format_size(self.total_bytes)
        return f"{known} + KV cache {kv} = {total}"


def make_footprint(
    shape: ModelShape,
    settings: EngineSettings,
    *,
    tp_size: int,
    device: Literal["cpu", "cuda"],
    dtype: str,
    max_model_len: int,
    max_num_batched_tokens: int,
    kv_cache_bytes: int | None,
) -> Footprint:
    """Return the memory of one of ``tp_size`` ranks; sizes that do not divide are rounded down."""
    size = DTYPE_BYTES[dtype]
    # Not an estimate here: the rank leaves exactly this out of its KV cache.
    if device == "cuda" and kv_cache_bytes is None:
        inner = shape.hidden_size + shape.intermediate_size
        activations = max_num_batched_tokens * inner * CUDA_ACTIVATION_BYTES_PER_TOKEN
    else:
        inner = 4 * shape.hidden_size + 3 * shape.intermediate_size // tp_size
        rows = min(settings.max_num_seqs, max_num_batched_tokens)
        activations = max_num_batched_tokens * inner * size + rows * shape.vocab_size * 4
    # The layout that the rank will make itself, so that both count the same blocks.
    layout = KVCacheLayout(
        make_groups(shape.layer_windows),
        num_kv_heads=num_kv_heads_of_rank(shape.num_kv_heads, tp_size),
        head_dim=shape.head_dim,
        block_size=settings.block_size,
        dtype_bytes=size,
    )
    windows = [group.sliding_window for group in layout.groups]
    return Footprint(
        weight_bytes=_weights_of_rank(shape, tp_size) * size,
        activation_bytes=activations,
        kv_bytes_for=lambda num_tokens: (
            min_blocks(windows, layout.block_size, num_tokens) * layout.block_bytes
        ),
        layout=layout,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_bytes,
    )


def outline_of_shape(shape: ModelShape) -> Outline:
    """Return the outline of a model, also if native engines can serve it."""
    layers = Counter(
        KVLayers(shape.num_kv_heads, 2 * shape.head_dim, window) for window in shape.layer_windows
    )
    return shape.outline or Outline(layers, 0, shape.num_parameters, 0, 0)


def _weights_of_rank(shape: ModelShape, tp_size: int) -> int:
    """Return the number of weights of a rank.

    Linear layers are cut; embeddings and norms are whole on every rank, KV projections where heads
    are replicated.
    """
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    cut = shape.num_layers * (
        2 * shape.hidden_size * query + 3 * shape.hidden_size * shape.intermediate_size
    )
    kv_cut = shape.num_layers * 2 * shape.hidden_size * kv
    whole = shape.num_parameters - cut - kv_cut
    return whole + cut // tp_size + kv_cut // min(tp_size, shape.num_kv_heads)
