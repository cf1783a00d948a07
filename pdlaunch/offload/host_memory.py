"""The host's share of the KV cache: one region, allocated once at start and pinned piece by piece."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from pdlaunch.errors import ConfigError
from pdlaunch.platform.limits import memory_bytes

Progress = Callable[[str, float | None], None]

PIECE_BYTES = 1024**3
_TOUCH_THREADS = 8
_PAGE_BYTES = 4096


class HostMemory:
    """``num_chunks`` chunks of ``chunk_bytes``; ``tensor`` is valid until ``close``.

    Pinned pieces hold whole chunks, so that no copy crosses their borders. ``progress`` is told after each piece.
    Raises ConfigError when the machine has less memory than asked for.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_bytes: int,
        *,
        pin: bool,
        progress: Progress,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        assert num_chunks > 0
        num_bytes = num_chunks * chunk_bytes
        _check_fits(num_bytes)
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # A kernel without huge pages: only slower to pin.
            region.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(region, dtype=torch.uint8)
        self._pinned: list[int] = []
        if pin:
            self._pin(max(1, piece_bytes // chunk_bytes) * chunk_bytes, progress)

    def close(self) -> None:
        """Unpin. Nothing may copy any more."""
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._pinned.clear()

    def _pin(self, piece_bytes: int, progress: Progress) -> None:
        num_bytes = self.tensor.numel()
        with ThreadPoolExecutor(_TOUCH_THREADS, thread_name_prefix="pin") as pool:
            for start in range(0, num_bytes, piece_bytes):
                piece = self.tensor[start : start + piece_bytes]
                # Registering would fault the pages in one by one, on one core.
                list(pool.map(_touch, piece.tensor_split(_TOUCH_THREADS)))
                code = torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.numel(), 0)  # type: ignore[no-untyped-call]
                if int(code) != 0:
                    raise ConfigError(
                        f"pinning host memory for the KV cache failed after {start} of {num_bytes} bytes: CUDA error {int(code)}",
                        field="kv_offload.host_memory",
                        value=num_bytes,
                        fix="Give it less memory.",
                    )
                self._pinned.append(piece.data_ptr())
                progress("pinning host memory", min(1.0, (start + piece_bytes) / num_bytes))


def _touch(memory: torch.Tensor) -> None:
    memory.numpy()[::_PAGE_BYTES] = 0


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
