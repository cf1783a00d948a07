"""Counts the KV blocks that a rank has room for, and allocates them."""

from __future__ import annotations

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.errors import ConfigError

_MOST_SPARED = 0.05
"""Share of a GPU that is left free at most, for CUDA contexts, libraries and graphs."""


def count_kv_blocks(
    spec: EngineSpec, layout: KVCacheLayout, device: torch.device, tp: TPGroup | None
) -> int:
    """Return how many blocks fit into the memory for the KV cache; the same on all ranks of ``tp``.

    Call it once the weights are allocated: without ``kv_cache_memory`` the cache gets what they
    have left. Raises ConfigError when not one block fits.
    """
    cache_bytes = _cache_bytes(spec, device)
    if tp is not None:
        # Ranks of a TP group share block ids: all have as many as the one with the least memory.
        cache_bytes = tp.least(cache_bytes)
    num_blocks = cache_bytes // layout.block_bytes
    if num_blocks < 1:
        raise _no_block(spec, cache_bytes, layout.block_bytes)
    return num_blocks


def allocate_kv_cache(
    layout: KVCacheLayout, num_blocks: int, dtype: torch.dtype, memory: KVMemory
) -> torch.Tensor:
    """Return ``[num_blocks, *layout.block_shape()]`` of zeros."""
    return (
        memory.zeros(num_blocks * layout.block_bytes)
        .view(dtype)
        .view(num_blocks, *layout.block_shape())
    )


def left_for_cache(
    *, free_bytes: int, total_bytes: int, own_bytes: int, utilization: float, activation_bytes: int
) -> int:
    """Return the bytes of the KV cache of a rank that sizes it itself, 0 when nothing is left.

    ``utilization`` of the GPU is the budget of this rank alone, as in vLLM: what other ranks and
    processes hold does not count against it, but cannot be had either. ``free_bytes`` and
    ``total_bytes`` are the GPU's; this process holds ``own_bytes`` by now and needs
    ``activation_bytes`` for a step.
    """
    budget = total_bytes * utilization - own_bytes
    available = free_bytes - total_bytes * min(_MOST_SPARED, 1 - utilization)
    return max(0, int(min(budget, available) - activation_bytes))


def _cache_bytes(spec: EngineSpec, device: torch.device) -> int:
    if spec.kv_cache_memory is not None:
        return spec.kv_cache_memory
    # The only size that is not planned: nobody knows before what a device has left.
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return left_for_cache(
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        own_bytes=torch.cuda.memory_reserved(device),
        utilization=spec.gpu_memory_utilization,
        activation_bytes=spec.activation_bytes,
    )


def _no_block(spec: EngineSpec, cache_bytes: int, block_bytes: int) -> ConfigError:
    if spec.kv_cache_memory is None:
        return ConfigError(
            f"the GPU has {cache_bytes} bytes left for the KV cache, a block takes {block_bytes}",
            field="gpu_memory_utilization",
            value=spec.gpu_memory_utilization,
            fix="Raise it, lower max_num_batched_tokens, or stop what else holds the GPU's memory.",
        )
    return ConfigError(
        f"kv_cache_memory {cache_bytes} bytes holds no block of {block_bytes} bytes",
        field="kv_cache_memory",
        value=cache_bytes,
        fix=f"Give it at least {block_bytes} bytes, or choose a smaller block_size.",
    )
