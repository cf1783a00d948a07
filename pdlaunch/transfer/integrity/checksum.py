"""Computes a checksum for each block and KV head: xxh3_64 over the head's bytes in each region,
joined over the regions of the block's group.

Checksums are per head, so ranks of different TP sizes can compare them. On a GPU, a kernel computes
the same checksums without copying the blocks. Source: XXH3 of the xxHash library.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.transfer.regions import BlockIds, KVRegions

try:
    import xxhash

    _hash: Callable[[Any], int] = xxhash.xxh3_64_intdigest
    ALGORITHM = "xxh3_64"
except ImportError:  # vLLM's environment has BLAKE3 and no xxhash
    from blake3 import blake3

    _hash = lambda content: int.from_bytes(blake3(content).digest(8), "little")  # noqa: E731
    ALGORITHM = "blake3_64"

# Weight of a region, so that swapped pages change the sum. Odd, so that the product loses no bits.
_WEIGHT = 0x9E3779B97F4A7C15

ChecksumArray = npt.NDArray[np.uint64]  # [num_blocks, num_heads]


@dataclass(eq=False)
class Checksums:
    """Checksums that are computed, or are being computed on a device."""

    join: Callable[[], ChecksumArray]  # returns them after ``ended``
    ended: torch.cuda.Event | None = None
    kept: Sequence[torch.Tensor] = ()  # stays alive until then for the kernel
    values: ChecksumArray | None = None

    def ready(self) -> bool:
        return self.ended is None or bool(self.ended.query())  # type: ignore[no-untyped-call]

    def result(self) -> ChecksumArray:
        """Wait for the checksums and return them by block and head, group by group."""
        if self.values is None:
            if self.ended is not None:
                self.ended.synchronize()
            self.values, self.kept = self.join(), ()
        return self.values


class KVHasher:
    """Computes checksums of the blocks of one rank's KV cache. Not thread-safe."""

    def __init__(self, kv: KVRegions) -> None:
        """On CUDA, compiles the kernel."""
        self._kv = kv
        # Kept until their kernels end, because the caller may drop a result earlier.
        self._launched: list[Checksums] = []
        self._uses_kernel = False
        if kv.device.type == "cuda":
            from pdlaunch.transfer.integrity.checksum_kernel import constants

            self._uses_kernel = fits_kernel(kv)
            self._constants = constants(kv.device)
            # With priority over the model's steps: a pull waits for its checksums.
            self._stream = torch.cuda.Stream(kv.device, priority=-1)  # type: ignore[no-untyped-call]
            self.start([[0]] * len(kv.groups), slice(0, 1)).result()

    def start(self, blocks: BlockIds, heads: slice) -> Checksums:
        """Start the checksums of each group's blocks: compute them on the CPU, or launch a kernel
        on CUDA, which does not wait for other streams: all writes to the blocks must have ended.
        """
        first, end, _ = heads.indices(self._kv.num_heads)
        if self._uses_kernel:
            return self._launch(blocks, range(first, end))
        values = self._hash_here(blocks, range(first, end))
        return Checksums(lambda: values)

    def _hash_here(self, blocks: BlockIds, heads: range) -> ChecksumArray:
        found = []
        for group, block_ids in zip(self._kv.groups, blocks, strict=False):
            digests = np.empty((len(group), len(block_ids), len(heads)), dtype=np.uint64)
            for index, region in enumerate(self._kv.regions[each] for each in group):
                chosen, rows = region[:, heads.start : heads.stop], block_ids
                if chosen.is_cuda:
                    ids = torch.tensor(block_ids, dtype=torch.int64, device=chosen.device)
                    chosen, rows = chosen.index_select(0, ids).cpu(), range(len(block_ids))
                # Without a copy, which would take longer than the checksums.
                memory = chosen.numpy()
                for row, block_id in enumerate(rows):
                    digests[index, row] = [_hash(head) for head in memory[block_id]]
            found.append(_joined(digests))
        return np.concatenate(found)

    def _launch(self, blocks: BlockIds, heads: range) -> Checksums:
        """Launch the kernel on its own stream, once for each ``head_bytes``. It reads addresses
        from page-locked host memory and writes checksums there, so no copies are needed.
        """
        from pdlaunch.transfer.integrity.checksum_kernel import UNIT_BYTES, hash_pages

        kv = self._kv
        anchor = kv.regions[0]
        # head_bytes -> the pages of one launch: their distances from the anchor in UNIT_BYTES.
        pages: dict[int, list[npt.NDArray[np.int64]]] = defaultdict(list)
        ids = [np.array(group, dtype=np.int64) for group in blocks]
        parts = [(group, index) for group, _ in enumerate(ids) for index in kv.groups[group]]
        for group, index in parts:
            place = kv.places[index]
            starts = place.address - anchor.data_ptr() + ids[group] * place.stride_bytes
            pages[place.head_bytes].append(starts // UNIT_BYTES)
        results: dict[int, torch.Tensor] = {}
        kept = []
        with torch.cuda.device(anchor.device), torch.cuda.stream(self._stream):
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            for head_bytes, found in pages.items():
                columns = np.concatenate(found)
                units = torch.empty(len(columns), dtype=torch.int64, pin_memory=True)
                units.numpy()[:] = columns
                shape = len(units), len(heads)
                results[head_bytes] = torch.empty(shape, dtype=torch.int64, pin_memory=True)
                hash_pages(
                    anchor, units, head_bytes, heads.start, results[head_bytes], self._constants
                )
                kept.append(units)
            ended.record(self._stream)

        def join() -> ChecksumArray:
            taken: dict[int, int] = defaultdict(int)
            by_group: list[list[ChecksumArray]] = [[] for _ in ids]
            for group, index in parts:
                size = kv.places[index].head_bytes
                first = taken[size]
                taken[size] += len(ids[group])
                rows = results[size].numpy().view(np.uint64)[first : taken[size]]
                by_group[group].append(rows)
            return np.concatenate([_joined(np.stack(regions)) for regions in by_group])

        launched = Checksums(join, ended, kept)
        self._launched = [other for other in self._launched if not other.ready()]
        self._launched.append(launched)
        return launched


def fits_kernel(kv: KVRegions) -> bool:
    """Return True if the kernel can hash these blocks. Pages of toy models are too small."""
    if kv.device.type == "cpu":
        return False
    from pdlaunch.transfer.integrity.checksum_kernel import supports

    return all(map(supports, kv.regions))


def algorithm_for(kv: KVRegions) -> str:
    """Return the name of the algorithm for these blocks; both ranks of a pair must have it."""
    return "xxh3_64" if fits_kernel(kv) else ALGORITHM


def _joined(digests: npt.NDArray[np.uint64]) -> ChecksumArray:
    """Join the checksums of regions, [num_regions, num_blocks, num_heads], by a weighted sum."""
    weights = np.array(
        [(2 * index + 1) * _WEIGHT % 2**64 if index else 1 for index in range(len(digests))],
        dtype=np.uint64,
    )
    joined: ChecksumArray = (digests * weights[:, None, None]).sum(axis=0, dtype=np.uint64)
    return joined
