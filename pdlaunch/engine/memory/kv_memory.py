"""Allocates the memory of a rank's KV cache and scratch, exports it to peers on this host, and maps
the memory of peers. The implementation for a CPU is here, too.

::

    owner:   zeros ──> export ──> a SharedRange, over the side channel,
                                  and perhaps a descriptor, over a Unix socket
    reader:                       map ──> address ──> close
                                  (before the owner frees the memory)

On a CPU, each allocation is a memfd. Seals fix its size, so that no reader accesses pages beyond
the end of the file, and prevent readers from writing. Mapped pages stay after the owner's death.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pdlaunch.errors import MemoryPoolError

# memfd: host memory; posix_fd, fabric: CuMem allocations; cuda_ipc: cudaMalloc allocations
RangeKind = Literal["memfd", "posix_fd", "fabric", "cuda_ipc"]


class NotShareable(Exception):
    """Raised for memory that a peer or this rank cannot map. The text says why."""


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Describes a range of an allocation, for a peer to map."""

    kind: RangeKind
    allocation_bytes: int
    offset_bytes: int  # offset of the range in its allocation
    num_bytes: int
    # 64 bytes of a fabric or CUDA IPC handle; empty if a descriptor is sent
    handle: bytes = b""

    @property
    def needs_fd(self) -> bool:
        return self.kind in ("memfd", "posix_fd")

    def check(self) -> None:
        """Raise NotShareable if the range is not within its allocation: peers are not trusted."""
        if self.offset_bytes < 0 or not (
            0 < self.num_bytes <= self.allocation_bytes - self.offset_bytes
        ):
            raise NotShareable(
                f"{self.num_bytes} bytes at offset {self.offset_bytes} are not within an "
                f"allocation of {self.allocation_bytes} bytes"
            )


@dataclass(frozen=True, slots=True)
class Export:
    """A range and its file descriptor, if it needs one. The caller must call ``close``."""

    range: SharedRange
    fd: int | None = None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class PeerMapping:
    """A peer's range, mapped into this process."""

    address: int  # of the first byte, in this process
    num_bytes: int
    close: Callable[[], None]  # unmaps the range; all reads must have ended


class KVMemory(ABC):
    """Allocates memory of one rank that peers may read, and maps memory of peers."""

    @abstractmethod
    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Allocate [num_bytes] uint8. The memory is freed with the last tensor that uses it."""

    @abstractmethod
    def export(self, tensor: torch.Tensor) -> Export:
        """Export a contiguous tensor from ``zeros``, or a view of it. Raises NotShareable."""

    @abstractmethod
    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        """Map a peer's range for this device; the caller closes ``fd``. Raises NotShareable."""


class PrivateKVMemory(KVMemory):
    """Allocates host memory that peers cannot map. The kernel provides pages at the first write."""

    def zeros(self, num_bytes: int) -> torch.Tensor:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def export(self, tensor: torch.Tensor) -> Export:
        raise NotShareable("the KV cache lies in memory of this process alone")

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        raise NotShareable("a rank with private memory cannot map memory of peers")


# Existing mappings stay writable, new mappings are read-only; Linux 5.1, not in Python's ``fcntl``.
_F_SEAL_FUTURE_WRITE = 0x0010
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_MADV_POPULATE_WRITE = 23  # Linux 5.14, not in Python's ``mmap``
# Bytes to populate by one call. Other threads can run between calls.
_PIECE_BYTES = 256 * 1024**2


class HostKVMemory(KVMemory):
    """Allocates all pages at once, so that first pulls are not three times slower. Thread-safe."""

    def __init__(self) -> None:
        # Address of each allocation -> its descriptor and size.
        self._regions: dict[int, tuple[int, int]] = {}

    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Raises MemoryPoolError."""
        fd = os.memfd_create("pdlaunch-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            pages = mmap.mmap(fd, num_bytes)
            _take_pages(pages)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            with contextlib.suppress(OSError):  # Not in older kernels; readers map it read-only.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as error:
            os.close(fd)
            raise MemoryPoolError(
                f"the KV cache needs {num_bytes} bytes ({error}): lower kv_cache_memory"
            ) from error
        tensor = torch.frombuffer(pages, dtype=torch.uint8)
        address = tensor.data_ptr()
        self._regions[address] = fd, num_bytes
        # Finalize the pages, not the tensor, because views of it may outlive it.
        weakref.finalize(pages, lambda: os.close(self._regions.pop(address)[0]))
        return tensor

    def export(self, tensor: torch.Tensor) -> Export:
        assert tensor.is_contiguous()
        start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for address, (fd, allocation_bytes) in self._regions.items():
            if address <= start and start + num_bytes <= address + allocation_bytes:
                shared = SharedRange("memfd", allocation_bytes, start - address, num_bytes)
                return Export(shared, os.dup(fd))
        raise NotShareable("the KV cache lies in memory that was not made for sharing")

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        if shared.kind != "memfd" or fd is None:
            raise NotShareable(f"a rank on a CPU cannot map memory of kind {shared.kind}")
        shared.check()
        size = shared.allocation_bytes
        try:
            # If a mapped file shrinks, reads of the lost pages kill this process (SIGBUS).
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise NotShareable("the peer's memory is not sealed against shrinking")
            if (found := os.fstat(fd).st_size) != size:
                raise NotShareable(f"the peer's memory has {found} bytes, but it states {size}")
            pages = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise NotShareable(f"the peer's memory cannot be mapped: {error}") from error
        start = int(np.frombuffer(pages, dtype=np.uint8).ctypes.data)
        return PeerMapping(start + shared.offset_bytes, shared.num_bytes, pages.close)


def _take_pages(region: mmap.mmap) -> None:
    """Make the kernel provide all pages. Raises OSError if there is too little memory."""
    for start in range(0, len(region), _PIECE_BYTES):
        try:
            region.madvise(_MADV_POPULATE_WRITE, start, min(_PIECE_BYTES, len(region) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:  # Older kernels provide pages at the first write.
                return
            raise
