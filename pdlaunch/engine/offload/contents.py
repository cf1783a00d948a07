"""Records what lies in a rank's host chunks, and proves it by the xxh3_64 of each (block, KV head),
taken when the block was stored.

On a CPU host memory is hashed, while a load copies it. On a GPU the device hashes its own blocks:
those that have been stored, and those that a load has brought back. The scheduler's tier and this
record agree unless something went wrong; a load that finds them different is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import xxhash

from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.tier import ChunkKey
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

Digests = list[tuple[int, ...]]
"""A list over blocks; each entry has one checksum for each KV head of the rank."""


@dataclass(frozen=True, slots=True)
class ChunkContent:
    """Says what one chunk holds."""

    key: ChunkKey
    first_slot: int
    """Slots before it hold nothing."""
    digests: Digests | None
    """Checksums of the slots from ``first_slot`` on; None when nothing is verified."""

    def digests_between(self, start: int, stop: int) -> Digests | None:
        """Return the checksums of the slots [start, stop); None when nothing is verified."""
        return (
            None
            if self.digests is None
            else self.digests[start - self.first_slot : stop - self.first_slot]
        )


@dataclass(frozen=True, slots=True)
class Slots:
    """Names the blocks of one chunk that a transfer touches: slots [start, stop)."""

    key: ChunkKey
    chunk_id: int
    start: int
    stop: int


class DeviceChunkHasher:
    """Computes the checksums of a transfer's blocks on the device, once it has ended there."""

    def __init__(self, device: KVHasher, executor: Executor) -> None:
        """A thread of ``executor`` waits for the device."""
        self._device = device
        self._executor = executor

    def submit(
        self, slots: Sequence[Slots], block_ids: Sequence[int]
    ) -> list[Future[list[Digests]]]:
        """Return futures of the digests by chunk, in order. ``block_ids`` are the blocks in the
        slots, one after another.
        """
        return [self._executor.submit(_by_chunk, slots, self._device.start(block_ids, slice(None)))]


def _by_chunk(slots: Sequence[Slots], checksums: Checksums) -> list[Digests]:
    rows = iter(checksums.result().tolist())
    return [[tuple(next(rows)) for _ in range(item.start, item.stop)] for item in slots]


class ChunkHasher:
    """Computes checksums of host memory on other threads, which do not hold the GIL meanwhile."""

    def __init__(
        self,
        host: HostMemory,
        block_bytes: int,
        head_bytes: int,
        executor: Executor,
        num_parts: int,
    ) -> None:
        """A block's ``head_bytes`` of each head follow each other. One transfer is shared out to
        ``num_parts`` tasks.
        """
        assert block_bytes % head_bytes == 0
        self._host = host
        self._block_bytes = block_bytes
        self._head_bytes = head_bytes
        self._executor = executor
        self._num_parts = num_parts

    def submit(self, slots: Sequence[Slots]) -> list[Future[list[Digests]]]:
        """Return futures of the digests by chunk; together, in order, they cover all slots."""
        # Chunks are shared out in order, so that the futures one after another give all of them in
        # order.
        parts = np.array_split(np.arange(len(slots)), min(self._num_parts, len(slots)) or 1)
        return [
            self._executor.submit(self._hash_all, [slots[index] for index in part])
            for part in parts
        ]

    def _hash_all(self, slots: Sequence[Slots]) -> list[Digests]:
        return [self._hash(item) for item in slots]

    def _hash(self, slots: Slots) -> Digests:
        memory = self._host.chunk(slots.chunk_id).numpy()
        blocks = memory[slots.start * self._block_bytes : slots.stop * self._block_bytes]
        heads = blocks.reshape(slots.stop - slots.start, -1, self._head_bytes)
        return [tuple(xxhash.xxh3_64_intdigest(head) for head in block) for block in heads]
