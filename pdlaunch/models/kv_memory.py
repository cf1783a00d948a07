"""Memory of the KV cache."""

from __future__ import annotations

import math
import mmap

import torch

from pdlaunch.kvcache.groups import KVCacheLayout


def allocate_kv_cache(layout: KVCacheLayout, num_blocks: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[num_blocks, *layout.block_shape()]`` of zeros.

    On a CPU the pages come from the kernel when they are first written: zeroing 1 GiB by hand takes seconds at start, and holds
    memory that no request may ever need.
    """
    shape = (num_blocks, *layout.block_shape())
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_blocks * layout.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
