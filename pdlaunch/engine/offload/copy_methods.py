"""Copy methods move bytes between device and host. Here are the interface and all methods but the
kernel, ``offload.gather_kernel``.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.engine.offload.copies import PageCopies, merge_runs
from pdlaunch.engine.offload.spec import Direction
from pdlaunch.machine.cuda_driver import load_library

NUM_BATCH_STREAMS = 3
"""Measured on an H200, one stream and three: blocks of 64 KiB 39 and 46 GB/s, 256 KiB 49 and 52
GB/s.
"""


class CopyMethod(ABC):
    """Copies pages. On CUDA it only enqueues, on the current stream, and keeps alive what the copy
    still reads.
    """

    name: str
    """The name in logs and benchmarks, such as ``batch`` or ``kernel/4``."""

    @abstractmethod
    def supports(self, copies: PageCopies) -> bool:
        """Say whether pages of this size and alignment can be copied."""

    @abstractmethod
    def copy(self, copies: PageCopies, direction: Direction) -> None:
        """Copy, or enqueue the copies of, all pages. Raises TransferError or RuntimeError."""


class HostCopy(CopyMethod):
    """Copies between two CPU tensors; blocks the calling thread and releases the GIL."""

    name = "memcpy"

    def supports(self, copies: PageCopies) -> bool:
        return copies.device.device.type == "cpu"

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        for device, host in _pairs(copies):
            if direction == "store":
                np.copyto(host.numpy(), device.numpy())
            else:
                np.copyto(device.numpy(), host.numpy())


class TorchCopy(CopyMethod):
    """Makes one torch copy for each run. It is slow for small blocks (12 GB/s at 64 KiB) and always
    available.
    """

    name = "torch"

    def supports(self, copies: PageCopies) -> bool:
        return True

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        for device, host in _pairs(copies):
            if direction == "store":
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)


class BatchCopy(CopyMethod):
    """Copies pages with ``cuMemcpyBatchAsync``, which leaves them to the copy engines. It is the
    best method for blocks of 32 KiB and more.

    Needs a driver of CUDA 12.8 or newer, and raises DriverError where there is none. Not for the
    default stream.
    """

    name = "batch"

    def __init__(self, load: Callable[[], ctypes.CDLL] = load_library) -> None:
        self._batches = BatchCopies(NUM_BATCH_STREAMS, load)

    def supports(self, copies: PageCopies) -> bool:
        return True

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        runs = merge_runs(copies)
        device = (runs.device_offsets + copies.device.data_ptr()).view(np.uint64)
        host = (runs.host_offsets + copies.host.piece_addresses[runs.host_pieces]).view(np.uint64)
        destinations, sources = (host, device) if direction == "store" else (device, host)
        main = torch.cuda.current_stream(copies.device.device)
        self._batches.enqueue(destinations, sources, runs.sizes.view(np.uint64), main)


def _pairs(copies: PageCopies) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the device and host bytes of each run."""
    device = copies.device.view(-1)
    runs = merge_runs(copies)
    columns = (runs.device_offsets, runs.host_pieces, runs.host_offsets, runs.sizes)
    for at_device, piece, at_host, size in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        yield (
            device[at_device : at_device + size],
            copies.host.pieces[piece][at_host : at_host + size],
        )
