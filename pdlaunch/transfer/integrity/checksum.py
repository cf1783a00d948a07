"""Computes checksums of KV blocks: xxh3_64 over the bytes of each (block, KV head), in the order
of memory.

A head's share of a block is one contiguous region of the KV cache, so that checksums can be
compared between TP sizes. On a GPU a kernel computes them where the blocks lie, bit for bit the
same. Source: XXH3 of the xxHash library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout

if TYPE_CHECKING:
    from pdlaunch.transfer.integrity.checksum_device import DeviceHasher

ALGORITHM = "xxh3_64"

ChecksumArray = npt.NDArray[np.uint64]
"""[num_blocks, num_heads]"""


class Checksums(Protocol):
    """Stands for checksums that are being computed; may be dropped at any time."""

    def ready(self) -> bool:
        """Return whether ``result`` would return at once."""

    def result(self) -> ChecksumArray:
        """Wait for the checksums and return them, by block and head."""


class KnownChecksums:
    """Holds checksums that are already computed."""

    def __init__(self, values: ChecksumArray) -> None:
        self._values = values

    def ready(self) -> bool:
        return True

    def result(self) -> ChecksumArray:
        return self._values


class HashBatch(Protocol):
    """Stands for blocks whose checksums are wanted, perhaps not all at once."""

    def start(self, blocks: slice, after: torch.cuda.Event | None = None) -> Checksums:
        """Begin to compute those of ``blocks``, a slice of the batch. On the CPU that computes them
        at once; on CUDA it waits for nothing.

        Whatever wrote the blocks must have ended, on the device too, or by the event ``after``:
        nothing else orders this behind the work of another stream.
        """


class HostBatch:
    """Computes checksums in the calling thread."""

    def __init__(self, memory: torch.Tensor, block_ids: Sequence[int], heads: slice) -> None:
        """``memory``: [num_blocks, num_kv_heads, head_bytes] uint8."""
        self._memory = memory
        self._block_ids = block_ids
        self._heads = heads

    def start(self, blocks: slice, after: torch.cuda.Event | None = None) -> KnownChecksums:
        if after is not None:
            after.synchronize()
        block_ids, memory = self._block_ids[blocks], self._memory
        if memory.device.type == "cpu":
            return KnownChecksums(_digests(memory, block_ids, self._heads))
        chosen = torch.tensor(block_ids, dtype=torch.int64, device=memory.device)
        # A toy model on CUDA: its regions are too small for the kernel, so the host hashes a copy.
        on_host = memory[:, self._heads].index_select(0, chosen).cpu()
        return KnownChecksums(_digests(on_host, range(len(block_ids)), slice(None)))


class KVHasher:
    """Computes the checksums of blocks of one rank's KV cache. Not thread-safe."""

    def __init__(self, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
        """``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim],
        contiguous. On CUDA the kernel is compiled here.
        """
        self._bytes = kv_cache.view(torch.uint8).view(
            kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes
        )
        self._device_hasher = _new_device_hasher(self._bytes)

    def prepare(self, block_ids: Sequence[int], heads: slice) -> HashBatch:
        """Prepare the checksums of ``block_ids`` and these heads of this rank."""
        if self._device_hasher is not None:
            return self._device_hasher.prepare(block_ids, heads)
        return HostBatch(self._bytes, block_ids, heads)

    def start(self, block_ids: Sequence[int], heads: slice) -> Checksums:
        """Begin to compute those of all of ``block_ids``; see ``HashBatch.start``."""
        return self.prepare(block_ids, heads).start(slice(None))

    def checksums(self, block_ids: Sequence[int], heads: slice) -> list[list[int]]:
        """Compute checksums and wait for them; by block and head."""
        checksums: list[list[int]] = self.start(block_ids, heads).result().tolist()
        return checksums


def _new_device_hasher(memory: torch.Tensor) -> DeviceHasher | None:
    """Return None on the CPU, and for the regions of toy models, which the kernel does not take."""
    if memory.device.type != "cuda":
        return None
    from pdlaunch.transfer.integrity.checksum_device import DeviceHasher
    from pdlaunch.transfer.integrity.checksum_kernel import supports

    return DeviceHasher(memory) if supports(memory) else None


def _digests(memory: torch.Tensor, block_ids: Sequence[int], heads: slice) -> ChecksumArray:
    """Hash blocks of ``memory``: [num_blocks, num_kv_heads, head_bytes] uint8 on the host."""
    blocks = memory.numpy()
    num_heads = len(range(*heads.indices(blocks.shape[1])))
    digests = (
        xxhash.xxh3_64_intdigest(head) for block_id in block_ids for head in blocks[block_id, heads]
    )
    return np.fromiter(digests, np.uint64, len(block_ids) * num_heads).reshape(
        len(block_ids), num_heads
    )
