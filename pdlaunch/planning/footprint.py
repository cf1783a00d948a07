"""Computes the memory of a rank from the shape of its model."""

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

# Times hidden_size + intermediate_size; reserved if gpu_memory_utilization sizes the KV cache
CUDA_ACTIVATION_BYTES_PER_TOKEN = 64
_VLLM_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Footprint:
    """Holds the memory of one rank, in bytes; for vLLM, a lower bound."""

    weight_bytes: int
    activation_bytes: int
    """Memory of the largest step; 0 (unknown) for vLLM.

    A fixed reserve if gpu_memory_utilization sets the size of the KV cache. Otherwise an estimate:
    hidden and inner states, and float32 logits of all running requests.
    """
    kv_bytes_for: Callable[[int], int]  # Bytes of KV cache of a request with this many tokens
    max_model_len: int
    # Size of the KV cache; None: the rank takes the free memory, whose size is known after start
    kv_cache_bytes: int | None
    layout: KVCacheLayout | None = None  # None: vLLM chooses the layout

    @property
    def num_blocks(self) -> int | None:
        if self.layout is None or self.kv_cache_bytes is None:
            return None
        return self.kv_cache_bytes // self.layout.block_bytes

    @property
    def min_kv_bytes(self) -> int:
        return self.kv_bytes_for(self.max_model_len)

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of the rank's KV cache; ``min_kv_bytes`` if its size is not known."""
        return self.min_kv_bytes if self.kv_cache_bytes is None else self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def longest_request_tokens(self, kv_bytes: int) -> int:
        """Return the tokens of the longest request whose KV fits into ``kv_bytes``; 0 if none."""
        size = self.layout.block_size if self.layout else _VLLM_BLOCK_SIZE
        # Binary search: a longer request never needs less memory than a shorter one.
        low, high = 0, math.ceil(self.max_model_len / size)
        while low < high:
            middle = (low + high + 1) // 2
            if self.kv_bytes_for(middle * size) <= kv_bytes:
                low = middle
            else:
                high = middle - 1
        return low * size

    def arithmetic(self) -> str:
        """Return the sum for a message: ``weights 1.2 GiB + KV cache 1 GiB = 2.2 GiB``."""
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
    """Return the memory of one of ``tp_size`` ranks. Shares of the ranks are rounded down."""
    size = DTYPE_BYTES[dtype]
    # In this case the rank reserves exactly these bytes; the other case is an estimate.
    if device == "cuda" and kv_cache_bytes is None:
        inner = shape.hidden_size + shape.intermediate_size
        activations = max_num_batched_tokens * inner * CUDA_ACTIVATION_BYTES_PER_TOKEN
    else:
        inner = 4 * shape.hidden_size + 3 * shape.intermediate_size // tp_size
        rows = min(settings.max_num_seqs, max_num_batched_tokens)
        activations = max_num_batched_tokens * inner * size + rows * shape.vocab_size * 4
    # The rank makes the same layout, so it counts the same number of blocks.
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
    """Return the model's outline, made from the shape for models that native engines serve."""
    layers = Counter(
        KVLayers(shape.num_kv_heads, 2 * shape.head_dim, window) for window in shape.layer_windows
    )
    return shape.outline or Outline(layers, 0, shape.num_parameters, 0, 0)


def _weights_of_rank(shape: ModelShape, tp_size: int) -> int:
    """Return the number of parameters on one rank.

    Linear layers are split over the ranks. Each rank has whole embeddings and norms. KV projections
    are split over at most ``num_kv_heads`` ranks; further ranks replicate heads.
    """
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    cut = shape.num_layers * (
        2 * shape.hidden_size * query + 3 * shape.hidden_size * shape.intermediate_size
    )
    kv_cut = shape.num_layers * 2 * shape.hidden_size * kv
    whole = shape.num_parameters - cut - kv_cut
    return whole + cut // tp_size + kv_cut // min(tp_size, shape.num_kv_heads)
