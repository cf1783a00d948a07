"""Defines the memory of a rank's KV cache and scratch: how a peer on this host gets at it, and how
this rank maps that of a peer.

::

    owner:   zeros ──> export ──> a SharedRange, over the side channel,
                                  and perhaps a descriptor, over a Unix socket
    reader:                       map ──> address ──> close
                                  (before the owner's memory is given back)
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

RangeKind = Literal["memfd", "posix_fd", "fabric", "cuda_ipc"]
"""memfd is memory of a CPU; posix_fd and fabric are CuMem; cuda_ipc is cudaMalloc."""


class NotShareable(Exception):
    """Is raised for memory that a peer, or this rank, cannot map; the text says why."""


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Describes a range of one allocation to peers of its owner."""

    kind: RangeKind
    allocation_bytes: int
    offset_bytes: int
    """Offset of the range in its allocation."""
    num_bytes: int
    handle: bytes = b""
    """64 bytes of a fabric or CUDA IPC handle; empty where a descriptor is handed over."""

    @property
    def needs_fd(self) -> bool:
        """Return whether a descriptor has to be handed over with it."""
        return self.kind in ("memfd", "posix_fd")

    def check(self) -> None:
        """Raise NotShareable when the range does not lie in its allocation: it comes from another
        process.
        """
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


class PeerMapping(ABC):
    """Holds a peer's range in the addresses of this process."""

    address: int
    """Address of its first byte."""
    num_bytes: int

    @abstractmethod
    def close(self) -> None:
        """Unmap; nothing reads it any more."""


class KVMemory(ABC):
    """Allocates the memory of one rank that peers may read, and maps theirs."""

    @abstractmethod
    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Allocate [num_bytes] uint8, freed with the last tensor that shares it. Raises what the
        allocator raises.
        """

    @abstractmethod
    def export(self, tensor: torch.Tensor) -> Export:
        """Export a contiguous tensor, or a view of one, that ``zeros`` has made. Raises
        NotShareable.
        """

    @abstractmethod
    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        """Let this rank's device read a peer's range. ``fd`` stays the caller's. Raises
        NotShareable; then nothing is mapped.
        """


class PrivateKVMemory(KVMemory):
    """Allocates memory of a CPU that no peer can map; its pages come from the kernel when they
    are first written.
    """

    def zeros(self, num_bytes: int) -> torch.Tensor:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def export(self, tensor: torch.Tensor) -> Export:
        raise NotShareable("the KV cache lies in memory of this process alone")

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        raise NotShareable("a rank with private memory maps none of its peers")
