"""Computes the memory of a rank from the shape of its model."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pdlaunch.config.model_files.outline import KVLayers, Outline
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.sizes import format_size
from pdlaunch.engine.kvcache.groups import KVCacheLayout

_VLLM_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Footprint:
    """Holds the memory of one rank, in bytes; for vLLM, a lower bound."""

    weight_bytes: int
    activation_bytes: int  # memory of the largest step; 0 (unknown) for vLLM
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
        return self.min_kv_bytes if self.kv_cache_bytes is None else self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def longest_request_tokens(self, kv_bytes: int) -> int:
        """Return the tokens of the longest request whose KV fits into ``kv_bytes``; 0 if none."""
        size = self.layout.block_size if self.layout else _VLLM_BLOCK_SIZE
        # A longer request never needs less memory than a shorter one.
        lengths = range(size, self.max_model_len + size, size)
        return size * bisect_right(lengths, kv_bytes, key=self.kv_bytes_for)

    def arithmetic(self) -> str:
        """Return the sum for a message: ``weights 1.2 GiB + KV cache 1 GiB = 2.2 GiB``."""
        parts = {"weights": self.weight_bytes, "activations": self.activation_bytes}
        known = " + ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        kv, total = format_size(self.kv_bytes), format_size(self.total_bytes)
        return f"{known} + KV cache {kv} = {total}"


def outline_of_shape(shape: ModelShape) -> Outline:
    """Return the model's outline, made from the shape for models that native engines serve."""
    layers = Counter(
        KVLayers(shape.num_kv_heads, 2 * shape.head_dim, window) for window in shape.layer_windows
    )
    return shape.outline or Outline(layers, 0, shape.num_parameters, 0, 0)


def weights_of_rank(shape: ModelShape, tp_size: int) -> int:
    """Return the number of parameters on one rank, rounded down.

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
