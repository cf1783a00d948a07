"""Makes the KV cache that ``bench transfer`` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups, num_kv_heads_of_rank
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.planning.role_engines import DTypeName


@dataclass(frozen=True, slots=True)
class BenchShape:
    """Describes the KV cache of one rank with all heads."""

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: DTypeName

    def layout(self, tp_size: int = 1) -> KVCacheLayout:
        """Return the layout of one rank of ``tp_size``."""
        return KVCacheLayout(
            groups=make_groups([None] * self.num_layers),
            num_kv_heads=num_kv_heads_of_rank(self.num_kv_heads, tp_size),
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype_bytes=getattr(torch, self.dtype).itemsize,
        )

    def new_cache(self, memory: KVMemory, tp_size: int = 1) -> torch.Tensor:
        """Return random [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]."""
        layout = self.layout(tp_size)
        pages = memory.zeros(self.num_blocks * layout.block_bytes).view(getattr(torch, self.dtype))
        return pages.view(self.num_blocks, *layout.block_shape()).normal_()
