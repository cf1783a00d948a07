"""Checksums of KV blocks: xxh3_64 over the bytes of one (block, KV head), in the byte order of memory.

A head's share of a block is one contiguous region of the KV cache, so that a checksum stays comparable between TP sizes.
Source: XXH3 of the xxHash library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from pdlaunch.kvcache.groups import KVCacheLayout

ALGORITHM = "xxh3_64"

_STAGED_BYTES = 64 * 1024**2


class BlockHasher:
    """Reads blocks of one rank's KV cache; device memory is copied to the host piecewise."""

    def __init__(self, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
        """``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous."""
        self._bytes = kv_cache.view(torch.uint8).view(kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes)
        self._blocks_a_piece = max(1, _STAGED_BYTES // layout.block_bytes)

    def checksums(self, block_ids: Sequence[int], heads: slice) -> list[list[int]]:
        """By block and head of this rank: ``[len(block_ids)][len(heads)]``, 64 bits each."""
        if self._bytes.device.type == "cpu":
            return _digests(self._bytes, block_ids, heads)
        found: list[list[int]] = []
        for start in range(0, len(block_ids), self._blocks_a_piece):
            piece = torch.tensor(block_ids[start : start + self._blocks_a_piece], device=self._bytes.device)
            on_host = self._bytes[:, heads].index_select(0, piece).cpu()
            found += _digests(on_host, range(len(on_host)), slice(None))
        return found


def _digests(memory: torch.Tensor, block_ids: Sequence[int], heads: slice) -> list[list[int]]:
    """``memory``: [num_blocks, num_kv_heads, head_bytes] uint8 on the host."""
    blocks = memory.numpy()
    return [[xxhash.xxh3_64_intdigest(head) for head in blocks[block_id, heads]] for block_id in block_ids]
