"""Allocates host memory for KV blocks: chunks in pieces of about 1 GiB, allocated once at start and
pinned beside a GPU.

A piece is anonymous memory in huge pages, touched by several threads and then registered: 0.1 s a
GiB on an H200's host, where the driver's allocator took 0.37 s and scattered copies of 4 KiB were
slower (44 instead of 48 GB/s).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.memory.host_pages import map_pages, touch_pages
from pdlaunch.engine.models.attention import ReportProgress
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import memory_bytes

IntArray = npt.NDArray[np.int64]

PIECE_BYTES = 1024**3


def register_pages(address: int, num_bytes: int) -> int:
    """Page-lock memory for all devices; returns CUDA's error code, 0 for none."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]


def unregister_pages(address: int) -> None:
    """Undo ``register_pages``."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class HostMemory:
    """Allocates ``num_chunks`` chunks of ``chunk_bytes``; chunk i lies in piece i //
    chunks_per_piece. ``progress`` is called after each pinned piece.

    Raises ConfigError when the machine has less memory than asked for, or refuses to pin it.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_bytes: int,
        *,
        pin: bool,
        progress: ReportProgress,
        piece_bytes: int = PIECE_BYTES,
        register: Callable[[int, int], int] = register_pages,
        unregister: Callable[[int], None] = unregister_pages,
    ) -> None:
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self._chunks_per_piece = max(1, piece_bytes // chunk_bytes)
        self._register = register
        self._unregister = unregister
        self._pinned: list[int] = []
        total_bytes = math.inf
        with contextlib.suppress(OSError, ValueError):  # a machine that does not tell
            total_bytes = memory_bytes()
        if num_chunks * chunk_bytes > total_bytes:
            raise self._refusal(f"this machine has {total_bytes}")
        self.pieces: list[torch.Tensor] = []
        """[chunks * chunk_bytes] uint8 each; the last one may be smaller."""
        for first in range(0, num_chunks, self._chunks_per_piece):
            end = min(first + self._chunks_per_piece, num_chunks)
            self.pieces.append(self._allocate((end - first) * chunk_bytes, pin=pin))
            if pin:
                progress("pinning host memory", end / num_chunks)
        self.piece_addresses = np.array([piece.data_ptr() for piece in self.pieces], dtype=np.int64)

    def places(self, chunk_ids: IntArray) -> tuple[IntArray, IntArray]:
        """Return for each chunk the index of its piece, and its offset in the piece in bytes."""
        pieces, places = np.divmod(chunk_ids, self._chunks_per_piece)
        return pieces, places * self.chunk_bytes

    def chunk(self, chunk_id: int) -> torch.Tensor:
        """Return the memory of one chunk: [chunk_bytes] uint8."""
        piece, place = divmod(chunk_id, self._chunks_per_piece)
        return self.pieces[piece][place * self.chunk_bytes : (place + 1) * self.chunk_bytes]

    def close(self) -> None:
        """Unpin the memory; no copy may run any more."""
        for address in self._pinned:
            self._unregister(address)
        self._pinned.clear()

    def _allocate(self, num_bytes: int, *, pin: bool) -> torch.Tensor:
        try:
            region = map_pages(num_bytes)
        except OSError as error:
            raise self._refusal(f"allocating {num_bytes} bytes failed: {error}") from error
        piece = torch.frombuffer(region, dtype=torch.uint8)
        if pin:
            # Registering would make the kernel provide the pages one by one.
            touch_pages(region)
            if code := self._register(piece.data_ptr(), num_bytes):
                raise self._refusal(f"pinning {num_bytes} bytes failed with CUDA error {code}")
            self._pinned.append(piece.data_ptr())
        return piece

    def _refusal(self, reason: str) -> ConfigError:
        num_bytes = self.num_chunks * self.chunk_bytes
        return ConfigError(
            f"kv_offload.host_memory needs {num_bytes} bytes for each rank: {reason}",
            field="kv_offload.host_memory",
            value=num_bytes,
            fix="Give it less memory; the ranks of a machine share what it has.",
        )
