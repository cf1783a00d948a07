"""The tensor of the KV cache."""

from __future__ import annotations

import torch

from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.memory.kv_memory import KVMemory


def allocate_kv_cache(
    layout: KVCacheLayout, num_blocks: int, dtype: torch.dtype, memory: KVMemory
) -> torch.Tensor:
    """Return ``[num_blocks, *layout.block_shape()]`` of zeros."""
    return (
        memory.zeros(num_blocks * layout.block_bytes)
        .view(dtype)
        .view(num_blocks, *layout.block_shape())
    )
