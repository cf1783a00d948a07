"""Asks the CUDA driver for devices and what they can do; without torch, and without a context.

Source: cuda.h of CUDA 12 and 13 (numbers of the attributes).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from pdlaunch.machine.facts import Availability, Gpu

LIBRARY = "libcuda.so.1"
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_VIRTUAL_MEMORY_MANAGEMENT = 102
_HANDLE_TYPE_FABRIC = 128

NO_DEVICE = "cuDeviceGetCount: no CUDA device is visible"


class DriverError(Exception):
    """Says that there is no driver or that it refuses; the text names the call."""


@dataclass(frozen=True, slots=True)
class Driver:
    """Holds what the driver says about this machine."""

    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]


def load_library(name: str = LIBRARY) -> ctypes.CDLL:
    """Load the driver's library. Raises DriverError where there is none."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from None


def read_driver(
    load: Callable[[], ctypes.CDLL] = load_library, imex_channels: Path = IMEX_CHANNELS
) -> Driver:
    """Read version and devices. Raises DriverError naming the call that failed."""
    calls = _Calls(load())
    calls("cuInit", 0)
    version = calls.read_int("cuDriverGetVersion")
    num_gpus = calls.read_int("cuDeviceGetCount")
    has_channel = imex_channels.is_dir() and any(imex_channels.iterdir())
    gpus = tuple(_read_gpu(calls, index, has_channel) for index in range(num_gpus))
    return Driver((version // 1000, version % 1000 // 10), gpus)


class _Calls:
    """Turns an error code into a DriverError that names the call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, name: str, *arguments: object) -> None:
        try:
            code = int(getattr(self._library, name)(*arguments))
        except AttributeError:
            raise DriverError(f"the CUDA driver has no {name}: it is too old") from None
        if code:
            raise DriverError(f"{name} failed: {self._error_name(code)}")

    def read_int(self, name: str, *arguments: object) -> int:
        """Call a function whose first parameter is where the driver writes an int."""
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def attribute(self, attribute: int, device: int) -> int | None:
        """Read an attribute of a device; None: this driver does not know it."""
        try:
            return self.read_int("cuDeviceGetAttribute", attribute, device)
        except DriverError:
            return None

    def pci_bus_id(self, device: int) -> str | None:
        """Read the PCI address of a device; None: this driver does not tell."""
        address = ctypes.create_string_buffer(32)
        try:
            self("cuDeviceGetPCIBusId", address, len(address), device)
        except DriverError:
            return None
        return address.value.decode()

    def uuid(self, device: int) -> str | None:
        """Read the UUID of a device, without its first word; None: the driver does not tell."""
        value = (ctypes.c_ubyte * 16)()
        try:
            self("cuDeviceGetUuid_v2", ctypes.byref(value), device)
        except DriverError:
            return None
        return str(UUID(bytes=bytes(value)))

    def _error_name(self, code: int) -> str:
        name = ctypes.c_char_p()
        with contextlib.suppress(AttributeError):
            self._library.cuGetErrorName(code, ctypes.byref(name))
        return f"{name.value.decode()} ({code})" if name.value else f"error {code}"


def _read_gpu(calls: _Calls, index: int, has_imex_channel: bool) -> Gpu:
    device = calls.read_int("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    calls("cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    calls("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major = calls.attribute(_COMPUTE_CAPABILITY_MAJOR, device)
    minor = calls.attribute(_COMPUTE_CAPABILITY_MINOR, device)
    virtual_memory = calls.attribute(_VIRTUAL_MEMORY_MANAGEMENT, device)
    supports_fabric = bool(calls.attribute(_HANDLE_TYPE_FABRIC, device))
    uuid = calls.uuid(device)
    gpu = Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        compute_capability=None if major is None or minor is None else (major, minor),
        has_virtual_memory=None if virtual_memory is None else bool(virtual_memory),
        has_fabric_handles=has_imex_channel and supports_fabric,
        pci_bus_id=calls.pci_bus_id(device),
    )
    return replace(gpu, uuid=uuid and f"{'MIG' if gpu.is_slice else 'GPU'}-{uuid}")


def probe_cumem(read: Callable[[], Driver] = read_driver) -> Availability:
    """Ask the driver whether CuMem pools work here; never raises."""
    try:
        return judge_cumem(read())
    except DriverError as error:
        return Availability(False, str(error))
    except Exception as error:  # A broken driver can fail in any way; the answer is still no.
        return Availability(
            False, f"the probe of the CUDA driver failed: {type(error).__name__}: {error}"
        )


def judge_cumem(driver: Driver, system: str = sys.platform) -> Availability:
    """Decide from what the driver said whether CuMem pools work."""
    if system != "linux":
        return Availability(False, f"CuMem pools need Linux; this is {system}")
    if not driver.gpus:
        return Availability(False, NO_DEVICE)
    without = [str(gpu.index) for gpu in driver.gpus if not gpu.has_virtual_memory]
    if without:
        devices = ", ".join(without)
        return Availability(
            False, f"cuDeviceGetAttribute: no virtual memory management on device {devices}"
        )
    return Availability(True, "cuDeviceGetAttribute: virtual memory management on every device")


def has_accelerator(read: Callable[[], Driver] = read_driver) -> bool:
    """Return whether threads of this process must be bound to a CUDA device; never raises."""
    try:
        return bool(read().gpus)
    except DriverError:
        return False
