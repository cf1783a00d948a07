"""Reads devices from the CUDA driver, without torch. Source: cuda.h of CUDA 12 and 13."""

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

from pdlaunch.machine.facts import Gpu

LIBRARY = "libcuda.so.1"
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")

_VIRTUAL_MEMORY_MANAGEMENT = 102
_HANDLE_TYPE_FABRIC = 128


class DriverError(Exception):
    """There is no CUDA driver, or one of its calls failed; the text names the call."""


def load_library(name: str = LIBRARY) -> ctypes.CDLL:
    """Load the driver's library. Raises DriverError if there is none."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from None


def read_gpus(
    load: Callable[[], ctypes.CDLL] = load_library, imex_channels: Path = IMEX_CHANNELS
) -> tuple[Gpu, ...]:
    """Return the CUDA devices. Raises DriverError with the name of the call that failed."""
    calls = _Calls(load())
    # Create no context, which would take hundreds of MB of GPU memory away from a rank.
    calls("cuInit", 0)
    num_gpus = calls.read_int("cuDeviceGetCount")
    if not num_gpus:
        raise DriverError("cuDeviceGetCount: no CUDA device is visible")
    has_channel = imex_channels.is_dir() and any(imex_channels.iterdir())
    return tuple(_read_gpu(calls, index, has_channel) for index in range(num_gpus))


class _Calls:
    """Calls functions of the driver; raises DriverError with the function's name on an error."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(self, name: str, *arguments: object) -> None:
        try:
            code = int(getattr(self.library, name)(*arguments))
        except AttributeError:
            raise DriverError(f"the CUDA driver has no {name}: it is too old") from None
        if code:
            text = ctypes.c_char_p()
            with contextlib.suppress(AttributeError):
                self.library.cuGetErrorName(code, ctypes.byref(text))
            shown = f"{text.value.decode()} ({code})" if text.value else f"error {code}"
            raise DriverError(f"{name} failed: {shown}")

    def knows(self, name: str, *arguments: object) -> bool:
        """Call a function that older drivers lack; return False if it fails or is missing."""
        try:
            self(name, *arguments)
        except DriverError:
            return False
        return True

    def read_int(self, name: str, *arguments: object) -> int:
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def has(self, attribute: int, device: int) -> bool:
        """Return True if a device has an attribute; False also if the driver does not know it."""
        value = ctypes.c_int()
        is_known = self.knows("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return is_known and bool(value.value)


def _read_gpu(calls: _Calls, index: int, has_imex_channel: bool) -> Gpu:
    device = calls.read_int("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    calls("cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    calls("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    address = ctypes.create_string_buffer(32)
    has_address = calls.knows("cuDeviceGetPCIBusId", address, len(address), device)
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        has_virtual_memory=calls.has(_VIRTUAL_MEMORY_MANAGEMENT, device),
        has_fabric_handles=has_imex_channel and calls.has(_HANDLE_TYPE_FABRIC, device),
        pci_bus_id=address.value.decode() if has_address else None,
    )
