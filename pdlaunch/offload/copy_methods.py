"""Copy methods move bytes between device and host. Here are the interface and the two methods that
need nothing but torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from pdlaunch.offload.copies import PageCopies, merge_runs
from pdlaunch.offload.spec import Direction


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
