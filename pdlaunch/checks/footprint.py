"""How many bytes a rank needs, from the model's shape alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pdlaunch.checks.context import Context, Engine
from pdlaunch.config.model_shape import DTYPE_BYTES, ModelShape
from pdlaunch.config.sizes import format_size

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one rank."""

    weight_bytes: int
    activation_bytes: int
    """Estimate for the largest step: hidden and inner states, and float32 logits of every running
    request.
    """
    block_bytes: int
    num_blocks_for_longest: int
    """KV blocks that one request of max_model_len needs, all groups together."""

    @property
    def host_block_bytes(self) -> int:
        """What a block takes in the host tier, where it begins on a page of the machine."""
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def min_kv_bytes(self) -> int:
        return self.num_blocks_for_longest * self.block_bytes

    def kv_bytes(self, engine: Engine) -> int:
        """What the rank will take for its KV cache; where it takes what is left, the least it
        needs.
        """
        return self.min_kv_bytes if engine.kv_cache_bytes is None else engine.kv_cache_bytes

    def total_bytes(self, engine: Engine) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes(engine)

    def arithmetic(self, engine: Engine) -> str:
        """``weights 1.2 GiB + activations 30 MiB + KV cache 1 GiB = 2.2 GiB``"""
        return (
            f"weights {format_size(self.weight_bytes)} + activations "
            f"{format_size(self.activation_bytes)}"
            f" + KV cache {format_size(self.kv_bytes(engine))} = "
            f"{format_size(self.total_bytes(engine))}"
        )


def footprint(engine: Engine) -> Footprint | None:
    """None: the model or its dtype is not known, or does not fit the tensor-parallel size."""
    shape, dtype, longest = engine.shape, engine.dtype, engine.max_model_len
    if shape is None or dtype is None or longest is None:
        return None
    size = DTYPE_BYTES[dtype]
    batched = engine.max_num_batched_tokens
    inner = 4 * shape.hidden_size + 3 * shape.intermediate_size // engine.tp_size
    return Footprint(
        weight_bytes=_weights_of_rank(shape, engine.tp_size) * size,
        activation_bytes=batched * inner * size
        + min(engine.settings.max_num_seqs, batched) * shape.vocab_size * 4,
        block_bytes=_block_bytes(shape, engine.tp_size, engine.settings.block_size, size),
        num_blocks_for_longest=_num_blocks(shape, longest, engine.settings.block_size),
    )


def longest_request_tokens(engine: Engine, kv_bytes: int) -> int:
    """The longest request whose KV blocks fit into ``kv_bytes`` of a rank; 0: none does."""
    shape, needed = engine.shape, footprint(engine)
    if shape is None or needed is None:
        return 0
    size = engine.settings.block_size
    low, high = 0, math.ceil((engine.max_model_len or 0) / size)
    while low < high:
        middle = (low + high + 1) // 2
        if _num_blocks(shape, middle * size, size) * needed.block_bytes <= kv_bytes:
            low = middle
        else:
            high = middle - 1
    return low * size


def ranks_by_gpu(context: Context) -> dict[int, Mapping[Engine, int]]:
    """Ranks on each GPU, by engine: they are dealt out in turn over all devices, prefill first."""
    num_gpus = len(context.machine.gpus)
    dealt: dict[int, dict[Engine, int]] = {gpu.index: {} for gpu in context.machine.gpus}
    first = 0
    for engine in context.on("cuda") if num_gpus else ():
        for gpu in range(num_gpus):
            count = _num_dealt(first + engine.num_ranks, num_gpus, gpu) - _num_dealt(
                first, num_gpus, gpu
            )
            if count:
                dealt[context.machine.gpus[gpu].index][engine] = count
        first += engine.num_ranks
    return dict(dealt)


def _num_dealt(num_ranks: int, num_gpus: int, gpu: int) -> int:
    """How many of the ranks 0 to num_ranks - 1 are on a GPU."""
    return max(0, (num_ranks - gpu + num_gpus - 1) // num_gpus)


def _weights_of_rank(shape: ModelShape, tp_size: int) -> int:
    """Linear layers are cut; embeddings and norms are whole on every rank, KV projections where
    heads are replicated.
    """
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    cut = shape.num_layers * (
        2 * shape.hidden_size * query + 3 * shape.hidden_size * shape.intermediate_size
    )
    kv_cut = shape.num_layers * 2 * shape.hidden_size * kv
    whole = shape.num_parameters - cut - kv_cut
    return whole + cut // tp_size + kv_cut // min(tp_size, shape.num_kv_heads)


def _block_bytes(shape: ModelShape, tp_size: int, block_size: int, dtype_bytes: int) -> int:
    """As ``KVCacheLayout.block_bytes``: the groups are as large as the rarest kind of layer."""
    layers = min(Counter(shape.layer_windows).values())
    heads = max(1, shape.num_kv_heads // tp_size)
    return heads * layers * 2 * block_size * shape.head_dim * dtype_bytes


def _num_blocks(shape: ModelShape, num_tokens: int, block_size: int) -> int:
    """As ``KVCacheManager.min_blocks``: full groups keep every block, sliding ones those that a
    window can touch.
    """
    kinds = Counter(shape.layer_windows)
    layers = min(kinds.values())
    whole = -(-num_tokens // block_size)
    blocks = 0
    for window, count in kinds.items():
        groups = -(-count // layers)
        blocks += groups * (
            whole if window is None else min(whole, (window - 1 + block_size - 1) // block_size + 1)
        )
    return blocks
