"""Allocates host memory for KV blocks: chunks in pieces of about 1 GiB, allocated once at start and
pinned beside a GPU.

A piece is anonymous memory in huge pages, touched by several threads and then registered: 0.1 s a
GiB on an H200's host, where the driver's allocator took 0.37 s and scattered copies of 4 KiB were
slower (44 instead of 48 GB/s).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import torch

from pdlaunch.engine.memory.host_pages import map_pages, touch_pages
from pdlaunch.engine.offload.spec import IntArray
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import memory_bytes

AllocationProgress = Callable[[str, float | None], None]
"""Called with what is done now and the fraction that is complete; None where that is unknown."""

PIECE_BYTES = 1024**3


def register_pages(address: int, num_bytes: int) -> int:
    """Page-lock memory for all devices; returns CUDA's error code, 0 for none."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]


def unregister_pages(address: int) -> None:
    """Undo ``register_pages``."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class HostMemory:
    """Allocates ``num_chunks`` chunks of ``chunk_bytes``; chunk i lies in piece i //
    chunks_per_piece. ``progress`` is called after each piece.

    Raises ConfigError when the machine has less memory than asked for, or refuses to pin it.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_bytes: int,
        *,
        pin: bool,
        progress: AllocationProgress,
        piece_bytes: int = PIECE_BYTES,
        register: Callable[[int, int], int] = register_pages,
        unregister: Callable[[int], None] = unregister_pages,
    ) -> None:
        assert num_chunks > 0
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self.chunks_per_piece = max(1, piece_bytes // chunk_bytes)
        _check_fits(num_chunks * chunk_bytes)
        self._register, self._unregister = register, unregister
        self._pinned: list[int] = []
        self.pieces = self._allocate(pin, progress)
        """[chunks * chunk_bytes] uint8 each; the last one may be smaller."""
        self.piece_addresses = np.array([piece.data_ptr() for piece in self.pieces], dtype=np.int64)

    def piece_of(self, chunk_ids: IntArray) -> IntArray:
        """Return the index of the piece that holds each chunk."""
        return chunk_ids // self.chunks_per_piece

    def offsets(self, chunk_ids: IntArray) -> IntArray:
        """Return the offset of each chunk in its piece, in bytes."""
        return chunk_ids % self.chunks_per_piece * self.chunk_bytes

    def chunk(self, chunk_id: int) -> torch.Tensor:
        """Return the memory of one chunk: [chunk_bytes] uint8."""
        start = chunk_id % self.chunks_per_piece * self.chunk_bytes
        return self.pieces[chunk_id // self.chunks_per_piece][start : start + self.chunk_bytes]

    def close(self) -> None:
        """Unpin the memory; no copy may run any more."""
        for address in self._pinned:
            self._unregister(address)
        self._pinned.clear()

    def _allocate(self, pin: bool, progress: AllocationProgress) -> list[torch.Tensor]:
        pieces: list[torch.Tensor] = []
        for first in range(0, self.num_chunks, self.chunks_per_piece):
            num_chunks = min(self.chunks_per_piece, self.num_chunks - first)
            pieces.append(self._allocate_piece(num_chunks * self.chunk_bytes, pin))
            if pin:
                progress("pinning host memory", (first + num_chunks) / self.num_chunks)
        return pieces

    def _allocate_piece(self, num_bytes: int, pin: bool) -> torch.Tensor:
        try:
            region = map_pages(num_bytes)
        except OSError as error:
            raise self._refusal(f"allocating {num_bytes} bytes failed: {error}") from error
        piece = torch.frombuffer(region, dtype=torch.uint8)
        if pin:
            self._pin(region, piece)
        return piece

    def _pin(self, region: mmap.mmap, piece: torch.Tensor) -> None:
        touch_pages(region)
        code = self._register(piece.data_ptr(), piece.numel())
        if code != 0:
            raise self._refusal(f"pinning {piece.numel()} bytes failed with CUDA error {code}")
        self._pinned.append(piece.data_ptr())

    def _refusal(self, reason: str) -> ConfigError:
        num_bytes = self.num_chunks * self.chunk_bytes
        return ConfigError(
            f"host memory for the KV cache, {num_bytes} bytes: {reason}",
            field="kv_offload.host_memory",
            value=num_bytes,
            fix="Give it less memory.",
        )


def _check_fits(num_bytes: int) -> None:
    try:
        total_bytes = memory_bytes()
    except (OSError, ValueError):
        return
    if num_bytes > total_bytes:
        raise ConfigError(
            f"kv_offload.host_memory needs {num_bytes} bytes, this machine has {total_bytes}",
            field="kv_offload.host_memory",
            value=num_bytes,
            fix=f"Give it less than {total_bytes} bytes, shared by all ranks of this machine.",
        )
