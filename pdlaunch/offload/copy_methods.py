"""How bytes get from device to host and back: the interface, and the two methods that need nothing but torch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pdlaunch.offload.copies import PageCopies, merge_runs
from pdlaunch.offload.spec import Direction


class CopyMethod(ABC):
    """Copies pages. On CUDA it only enqueues, on the current stream, and keeps alive what the copy still reads."""

    name: str
    """For people: ``batch``, ``kernel/16``."""

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
        device, host = copies.device.view(-1).numpy(), copies.host.numpy()
        runs = merge_runs(copies)
        for at_device, at_host, size in zip(
            runs.device_offsets.tolist(), runs.host_offsets.tolist(), runs.sizes.tolist(), strict=True
        ):
            device_bytes, host_bytes = device[at_device : at_device + size], host[at_host : at_host + size]
            if direction == "store":
                np.copyto(host_bytes, device_bytes)
            else:
                np.copyto(device_bytes, host_bytes)


class TorchCopy(CopyMethod):
    """One torch copy a run: slow for small blocks (12 GB/s at 64 KiB), there where nothing else is."""

    name = "torch"

    def supports(self, copies: PageCopies) -> bool:
        return True

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        device, host = copies.device.view(-1), copies.host
        runs = merge_runs(copies)
        for at_device, at_host, size in zip(
            runs.device_offsets.tolist(), runs.host_offsets.tolist(), runs.sizes.tolist(), strict=True
        ):
            device_bytes, host_bytes = device[at_device : at_device + size], host[at_host : at_host + size]
            if direction == "store":
                host_bytes.copy_(device_bytes, non_blocking=True)
            else:
                device_bytes.copy_(host_bytes, non_blocking=True)
