"""How bytes get from device to host and back: the interface, and the two methods that need nothing
but torch.
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
    """For people: ``batch``, ``kernel/4``."""

    @abstractmethod
    def supports(self, copies: PageCopies) -> bool:
        """Whether pages of this size and alignment can be copied."""

    @abstractmethod
    def copy(self, copies: PageCopies, direction: Direction) -> None:
        """Copy, or enqueue the copies of, all pages. Raises TransferError or RuntimeError."""


class HostCopy(CopyMethod):
    """Between two CPU tensors; blocks the calling thread, without the GIL."""

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
    """One torch copy a run: slow for small blocks (12 GB/s at 64 KiB), there where nothing else
    is.
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
    """Device and host bytes of each run."""
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
