"""Counts the KV blocks that a rank allocates."""

from __future__ import annotations

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.errors import ConfigError
from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.models.tensor_parallel import TPGroup


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
        raise ConfigError(
            f"kv_cache_memory {cache_bytes} bytes holds no block of {layout.block_bytes} bytes",
            field="kv_cache_memory",
            value=cache_bytes,
            fix=f"Give it at least {layout.block_bytes} bytes, or choose a smaller block_size.",
        )
    return num_blocks


def _cache_bytes(spec: EngineSpec, device: torch.device) -> int:
    if spec.kv_cache_memory is not None:
        return spec.kv_cache_memory
    # The only size that is not planned: nobody knows before what a device has left.
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    unusable = total_bytes * (1 - spec.gpu_memory_utilization)
    return max(0, int(free_bytes - unusable - spec.activation_bytes))
