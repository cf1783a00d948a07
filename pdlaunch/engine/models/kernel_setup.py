"""Sizes of the attention kernels: of tiles, and of the splits of contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton

from pdlaunch.engine.kvcache.groups import KVCacheLayout

TARGET_PROGRAMS = 1024
"""Programs that fill the device: eight for each of an H200's multiprocessors."""
MAX_SPLITS = 32
MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Says how kernels cut contexts; fixed at launch, whatever the lengths are."""

    num_splits: int
    """Most splits of a row; a power of two."""
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
    tile: int = 32
    """Positions that a program of decode reads at a time."""
    chunk_tokens: int = field(init=False)
    chunk_tile: int = field(init=False)
    """The same of chunks."""

    def __post_init__(self) -> None:
        self.place = {
            layer: (index, slot)
            for index, group in enumerate(self.layout.groups)
            for slot, layer in enumerate(group.layers)
        }
        self.padded_dim = max(MIN_DOT, triton.next_power_of_2(self.layout.head_dim))
        is_large = self.padded_dim * self.layout.dtype_bytes > 256
        self.chunk_tokens, self.chunk_tile = (16, 32) if is_large else (64, 64)
