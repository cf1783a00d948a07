"""Computes checksums of KV blocks: xxh3_64 over the bytes of each (block, KV head), in the order
of memory.

A head's share of a block is one contiguous region of the KV cache, so that checksums can be
compared between TP sizes. On a GPU a kernel computes them where the blocks lie, bit for bit the
same. Source: XXH3 of the xxHash library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout

ALGORITHM = "xxh3_64"

ChecksumArray = npt.NDArray[np.uint64]  # [num_blocks, num_heads]


class Checksums:
    """Stands for checksums that are computed, or being computed on a device."""

    def __init__(
        self,
        values: ChecksumArray,
        ended: torch.cuda.Event | None = None,
        block_ids: torch.Tensor | None = None,
    ) -> None:
        """``values`` are final after ``ended``. The kernel reads ``block_ids`` meanwhile."""
        self._values = values
        self._ended = ended
        self._block_ids = block_ids

    def ready(self) -> bool:
        return self._ended is None or bool(self._ended.query())  # type: ignore[no-untyped-call]

    def result(self) -> ChecksumArray:
        """Wait for the checksums and return them, by block and head."""
        if self._ended is not None:
            self._ended.synchronize()
        return self._values


class KVHasher:
    """Computes the checksums of blocks of one rank's KV cache. Not thread-safe."""

    def __init__(self, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
        """``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim],
        contiguous. On CUDA the kernel is compiled here.
        """
        self._bytes = kv_cache.view(torch.uint8).view(
            kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes
        )
        # Kept until they end: a kernel uses its memory whether or not anybody wants the result.
        self._launched: list[Checksums] = []
        self._uses_kernel = False
        if self._bytes.is_cuda:
            from pdlaunch.transfer.integrity.checksum_kernel import constants, supports

            # The regions of toy models are too small for it.
            self._uses_kernel = supports(self._bytes)
            self._constants = constants(self._bytes.device)
            self._stream = torch.cuda.Stream(self._bytes.device)  # type: ignore[no-untyped-call]
            self.start([0], slice(0, 1)).result()

    def start(self, block_ids: Sequence[int], heads: slice) -> Checksums:
        """Begin to compute the checksums of these blocks and heads. On the CPU that computes them
        at once; on CUDA it waits for nothing. Whatever wrote the blocks must have ended, on the
        device too: nothing orders this behind the work of another stream.
        """
        if self._uses_kernel:
            return self._launch(block_ids, heads)
        regions, rows = self._bytes[:, heads], block_ids
        if regions.is_cuda:
            chosen = torch.tensor(block_ids, dtype=torch.int64, device=regions.device)
            regions, rows = regions.index_select(0, chosen).cpu(), range(len(block_ids))
        # Hashed where they lie: a copy would take longer than the checksums.
        memory = regions.numpy()
        digests = [xxhash.xxh3_64_intdigest(head) for row in rows for head in memory[row]]
        return Checksums(np.array(digests, dtype=np.uint64).reshape(len(rows), memory.shape[1]))

    def checksums(self, block_ids: Sequence[int], heads: slice) -> list[list[int]]:
        """Compute checksums and wait for them; by block and head."""
        checksums: list[list[int]] = self.start(block_ids, heads).result().tolist()
        return checksums

    def _launch(self, block_ids: Sequence[int], heads: slice) -> Checksums:
        """Launch the kernel on a stream of its own. It reads block ids from page-locked host memory
        and writes checksums there, so that nothing is copied.
        """
        from pdlaunch.transfer.integrity.checksum_kernel import hash_regions

        first_head, end_head, _ = heads.indices(self._bytes.shape[1])
        ids = torch.empty(len(block_ids), dtype=torch.int64, pin_memory=True)
        ids.numpy()[:] = block_ids
        results = torch.empty((len(ids), end_head - first_head), dtype=torch.int64, pin_memory=True)
        with torch.cuda.device(self._bytes.device), torch.cuda.stream(self._stream):
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            hash_regions(self._bytes.view(torch.int64), ids, first_head, results, self._constants)
            ended.record(self._stream)
        launched = Checksums(results.numpy().view(np.uint64), ended, ids)
        self._launched = [other for other in self._launched if not other.ready()]
        self._launched.append(launched)
        return launched
