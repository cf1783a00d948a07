"""Defines the memory of a rank's KV cache and scratch: how a peer on this host gets at it, and how
this rank maps that of a peer. Here is also the memory of a rank on a CPU.

::

    owner:   zeros ──> export ──> a SharedRange, over the side channel,
                                  and perhaps a descriptor, over a Unix socket
    reader:                       map ──> address ──> close
                                  (before the owner's memory is given back)

On a CPU each allocation is a memfd. Seals keep it as large as it is, so that no reader meets the
end of the file, and keep readers from writing. The pages outlive their owner.
"""

from __future__ import annotations

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

# memfd is memory of a CPU; posix_fd and fabric are CuMem; cuda_ipc is cudaMalloc
RangeKind = Literal["memfd", "posix_fd", "fabric", "cuda_ipc"]


class NotShareable(Exception):
    """Is raised for memory that a peer, or this rank, cannot map; the text says why."""


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Describes a range of one allocation to peers of its owner."""

    kind: RangeKind
    allocation_bytes: int
    offset_bytes: int  # offset of the range in its allocation
    num_bytes: int
    # 64 bytes of a fabric or CUDA IPC handle; empty where a descriptor is handed over
    handle: bytes = b""

    @property
    def needs_fd(self) -> bool:
        """Return whether a descriptor has to be handed over with it."""
        return self.kind in ("memfd", "posix_fd")

    def check(self) -> None:
        """Raise NotShareable unless the range of another process lies in its allocation."""
        if self.offset_bytes < 0 or not (
            0 < self.num_bytes <= self.allocation_bytes - self.offset_bytes
        ):
            raise NotShareable(
                f"{self.num_bytes} bytes from {self.offset_bytes} on are not within an allocation "
                f"of {self.allocation_bytes}"
            )


@dataclass(frozen=True, slots=True)
class Export:
    """Holds a range and its descriptor, if it has one, which belongs to this object's holder."""

    range: SharedRange
    fd: int | None = None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class PeerMapping:
    """Holds a peer's range in the addresses of this process."""

    address: int  # address of its first byte
    num_bytes: int
    close: Callable[[], None]  # unmaps the range; nothing reads it any more


class KVMemory(ABC):
    """Allocates the memory of one rank that peers may read, and maps theirs."""

    @abstractmethod
    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Allocate [num_bytes] uint8, freed with the last tensor that shares it."""

    @abstractmethod
    def export(self, tensor: torch.Tensor) -> Export:
        """Export a contiguous tensor, or view of one, that ``zeros`` made. Raises NotShareable."""

    @abstractmethod
    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        """Let this rank's device read a peer's range; ``fd`` stays open. Raises NotShareable."""


class PrivateKVMemory(KVMemory):
    """Allocates memory of a CPU that no peer can map; pages come when they are first written."""

    def zeros(self, num_bytes: int) -> torch.Tensor:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def export(self, tensor: torch.Tensor) -> Export:
        raise NotShareable("the KV cache lies in memory of this process alone")

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        raise NotShareable("a rank with private memory maps none of its peers")


# Mappings that exist stay writable, new ones are for reading; Linux 5.1, not in Python's ``fcntl``.
_F_SEAL_FUTURE_WRITE = 0x0010
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_MADV_POPULATE_WRITE = 23  # linux 5.14, not in Python's ``mmap``
# Bytes that are populated by one call; other threads get a turn in between
_PIECE_BYTES = 256 * 1024**2


class HostKVMemory(KVMemory):
    """Allocates all pages at once: else first pulls take three times as long. Thread-safe."""

    def __init__(self) -> None:
        self._regions: dict[int, tuple[int, int]] = {}
        """The descriptor and size of every living allocation, by its address."""

    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Raises MemoryPoolError."""
        fd = os.memfd_create("pdlaunch-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            pages = mmap.mmap(fd, num_bytes)
            _take_pages(pages)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            with contextlib.suppress(OSError):  # An older kernel: readers are of this launch.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as error:
            os.close(fd)
            raise MemoryPoolError(
                f"no {num_bytes} bytes for the KV cache ({error}): lower kv_cache_memory"
            ) from error
        tensor = torch.frombuffer(pages, dtype=torch.uint8)
        address = tensor.data_ptr()
        self._regions[address] = fd, num_bytes
        # Of the pages, not of this tensor: views of it, which ``export`` takes, outlive it.
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
            # Lost pages of a file that shrinks while it is mapped kill their reader (SIGBUS).
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise NotShareable("the peer's memory is not sealed against shrinking")
            if (found := os.fstat(fd).st_size) != size:
                raise NotShareable(f"the peer's memory has {found} bytes, stated are {size}")
            pages = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise NotShareable(f"the peer's memory cannot be mapped: {error}") from error
        start = int(np.frombuffer(pages, dtype=np.uint8).ctypes.data)
        return PeerMapping(start + shared.offset_bytes, shared.num_bytes, pages.close)


def _take_pages(region: mmap.mmap) -> None:
    """Raises OSError when there is too little memory."""
    for start in range(0, len(region), _PIECE_BYTES):
        try:
            region.madvise(_MADV_POPULATE_WRITE, start, min(_PIECE_BYTES, len(region) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:  # An older kernel takes pages when they are written.
                return
            raise
