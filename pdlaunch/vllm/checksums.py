"""Computes a checksum of each (block, KV head) over all layers of vLLM's KV caches.

A layer's cache is [num_blocks, num_heads, block_size, content] as vLLM's layout LBHNC has it, keys
and values side by side in the content. So a head's share of a block is one run of bytes, and
checksums can be compared between TP sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import blake3
import numpy as np
import torch

from pdlaunch.vllm.statements import ChecksumArray

_CHECKSUM_BYTES = 8


def new_hasher(caches: Sequence[torch.Tensor]) -> BlockHasher:
    """Return the hasher for these layers, in this order. Raises ValueError for other layouts."""
    regions = [_regions(cache) for cache in caches]
    if len({(each.shape[1], each.device) for each in regions}) != 1:
        raise ValueError("the KV caches of the layers differ in heads or devices")
    return CpuHasher(regions) if regions[0].device.type == "cpu" else CudaHasher(regions)


def _regions(cache: torch.Tensor) -> torch.Tensor:
    """Return a layer's cache as [num_blocks, num_heads, bytes] uint8."""
    if cache.dim() != 4 or not cache.is_contiguous():
        raise ValueError(
            f"a KV cache of shape {tuple(cache.shape)} and strides {cache.stride()} does not keep "
            "a block's heads one after another"
        )
    return cache.view(cache.shape[0], cache.shape[1], -1).view(torch.uint8)


class CpuHasher:
    """Hashes with BLAKE3: 3.7 GB/s on one core with AVX-512, and vLLM brings it."""

    algorithm = "blake3"

    def __init__(self, regions: Sequence[torch.Tensor]) -> None:
        """``regions``: of each layer [num_blocks, num_heads, bytes] uint8."""
        self.num_heads: int = regions[0].shape[1]
        self._layers = [each.numpy() for each in regions]

    def checksums(self, block_ids: Sequence[int]) -> ChecksumArray:
        digests = b"".join(
            _blake3(layer[block_id, head] for layer in self._layers)
            for block_id in block_ids
            for head in range(self.num_heads)
        )
        return np.frombuffer(digests, dtype=np.uint64).reshape(len(block_ids), self.num_heads)


class CudaHasher:
    """Hashes each layer where it lies (XXH3), and what comes out with BLAKE3 on the host."""

    algorithm = "xxh3_64+blake3"

    def __init__(self, regions: Sequence[torch.Tensor]) -> None:
        """``regions``: of each layer [num_blocks, num_heads, bytes] uint8. Raises ValueError."""
        from pdlaunch.transfer.integrity.checksum_kernel import constants, hash_regions, supports

        if not all(supports(each) for each in regions):
            raise ValueError(
                f"the kernel takes no heads of {regions[0].shape[2]} bytes in a block: they are "
                "too small, or no multiple of 16"
            )
        self.num_heads: int = regions[0].shape[1]
        self._hash_regions = hash_regions
        self._words = [each.view(torch.int64) for each in regions]
        self._constants = constants(regions[0].device)

    def checksums(self, block_ids: Sequence[int]) -> ChecksumArray:
        device = self._constants.device
        ids = torch.tensor(block_ids, dtype=torch.int64, device=device)
        shape = (len(self._words), len(block_ids), self.num_heads)
        results = torch.empty(shape, dtype=torch.int64, device=device)
        # On the stream of the step that wrote the blocks, so behind it.
        for words, result in zip(self._words, results, strict=True):
            self._hash_regions(words, ids, 0, result, self._constants)
        by_head = results.permute(1, 2, 0).contiguous().cpu().numpy().view(np.uint8)
        digests = b"".join(_blake3([head]) for block in by_head for head in block)
        return np.frombuffer(digests, dtype=np.uint64).reshape(shape[1:])


BlockHasher = CpuHasher | CudaHasher


def _blake3(parts: Any) -> bytes:
    digest = blake3.blake3()
    for part in parts:
        digest.update(part)
    found: bytes = digest.digest(_CHECKSUM_BYTES)
    return found
