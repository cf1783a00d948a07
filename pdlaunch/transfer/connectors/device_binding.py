"""Binds the KV cache's CUDA device to every thread that touches KV blocks.

The current device is thread-local, and libraries change it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from pdlaunch.machine.cuda_driver import has_accelerator


class DeviceSwitch(Protocol):
    """Sets the CUDA device of the calling thread, as ``torch.cuda`` does."""

    def set_device(self, device: int) -> None: ...


class DeviceBinding:
    """Captures the device of the KV cache once; ``bind`` makes it that of the calling thread."""

    def __init__(self, switch: DeviceSwitch | None) -> None:
        """``switch`` is None on a machine without an accelerator, where there is nothing to
        bind.
        """
        self._switch = switch
        self._device_index: int | None = None

    def capture(self, kv_cache: torch.Tensor) -> None:
        """Keep the device's index for ``bind``. Call it before any library is asked to do
        anything.
        """
        if kv_cache.device.type != "cpu":
            self._device_index = kv_cache.get_device()

    def bind(self) -> None:
        """Make the captured device that of this thread."""
        if self._switch is not None and self._device_index is not None:
            self._switch.set_device(self._device_index)


def new_device_binding() -> DeviceBinding:
    """Make a binding for this machine."""
    return DeviceBinding(torch.cuda if has_accelerator() else None)
