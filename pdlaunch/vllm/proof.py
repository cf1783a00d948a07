"""Judges blocks that a decode worker has read, against what prefill workers state about them.

Computes a checksum of each (block, KV head) over all layers of vLLM's KV caches.

A layer's cache is [num_blocks, num_heads, block_size, content] as vLLM's layout LBHNC has it, keys
and values side by side in the content. So a head's share of a block is one run of bytes, and
checksums can be compared between TP sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np
import torch

from pdlaunch.vllm.statements import ChecksumArray, Statement

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
        from pdlaunch.transfer.integrity.checksum_kernel import (
            UNIT_BYTES,
            constants,
            hash_pages,
            supports,
        )

        if not all(supports(each) for each in regions):
            raise ValueError(
                f"the kernel takes no heads of {regions[0].shape[2]} bytes in a block: they are "
                "too small, or no multiple of 16"
            )
        self.num_heads: int = regions[0].shape[1]
        self._hash_pages, self._unit_bytes = hash_pages, UNIT_BYTES
        self._regions = regions
        self._constants = constants(regions[0].device)

    def checksums(self, block_ids: Sequence[int]) -> ChecksumArray:
        device = self._constants.device
        ids = torch.tensor(block_ids, dtype=torch.int64, device=device)
        shape = (len(self._regions), len(block_ids), self.num_heads)
        results = torch.empty(shape, dtype=torch.int64, device=device)
        # On the stream of the step that wrote the blocks, so behind it.
        for region, result in zip(self._regions, results, strict=True):
            units = ids * (region.stride(0) // self._unit_bytes)
            self._hash_pages(region, units, region.shape[2], 0, result, self._constants)
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


def first_head(total_num_heads: int, tp_size: int, tp_rank: int) -> int:
    """Return the index of a rank's first KV head among those of the model.

    With more ranks than heads, neighbours have the same one.
    """
    return tp_rank * total_num_heads // tp_size


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    token_hash: str
    # All blocks of the prompt at the prefill engine; the last ones were read.
    remote_block_ids: tuple[int, ...]
    first_head: int
    algorithm: str
    checksums: ChecksumArray  # checksums of the blocks that were read


def judge(read: ReadBlocks, statements: Mapping[int, Statement | None]) -> str:
    """Return why blocks must not be used; empty: they are those that prefill computed.

    ``statements``: of each prefill rank whose heads were read, None where there is none any more.
    """
    num_blocks, num_heads = read.checksums.shape
    open_heads = set(range(read.first_head, read.first_head + num_heads))
    for rank, statement in sorted(statements.items()):
        if statement is None:
            return f"rank {rank} does not vouch for them any more: their lease has expired"
        if reason := _difference(read, statement, num_blocks):
            return f"{reason} (rank {rank})"
        stated = range(statement.first_head, statement.first_head + statement.checksums.shape[1])
        heads = [head for head in stated if head in open_heads]
        ours = read.checksums[:, [head - read.first_head for head in heads]]
        theirs = statement.checksums[
            len(statement.block_ids) - num_blocks :, [head - stated.start for head in heads]
        ]
        wrong = (ours != theirs).nonzero()
        if len(wrong[0]):
            return (
                f"{len(wrong[0])} of {ours.size} checksums of rank {rank} differ, first in block "
                f"{wrong[0][0]} of those read, head {heads[wrong[1][0]]}"
            )
        open_heads -= set(heads)
    return f"nobody vouches for heads {_listed(sorted(open_heads))}" if open_heads else ""


def _difference(read: ReadBlocks, statement: Statement, num_blocks: int) -> str:
    if statement.algorithm != read.algorithm:
        return f"prefill hashes with {statement.algorithm}, decode with {read.algorithm}"
    if statement.token_hash != read.token_hash:
        return "they are those of another prompt"
    if statement.block_ids != read.remote_block_ids:
        return "prefill vouches for other blocks than it was said to have"
    if num_blocks > len(statement.block_ids):
        return f"prefill vouches for {len(statement.block_ids)} blocks, {num_blocks} were read"
    return ""


def _listed(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
