"""Whether this process has a CUDA device that its threads must be bound to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pdlaunch.platform.cuda_driver import Driver, DriverError, read_driver


class DeviceSwitch(Protocol):
    """What sets the CUDA device of the calling thread: ``torch.cuda``."""

    def set_device(self, device: int) -> None: ...


def has_accelerator(read: Callable[[], Driver] = read_driver) -> bool:
    """Never raises."""
    try:
        return bool(read().gpus)
    except DriverError:
        return False
