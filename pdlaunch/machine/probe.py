"""Probes this machine in well under a second, and records the reasons of unknown facts. Reads GPUs
from the CUDA driver, without torch. Source: cuda.h and nvml.h of CUDA 12 and 13.
"""

import contextlib
import ctypes
import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pdlaunch.machine import host
from pdlaunch.machine.facts import Fact, Gpu, Machine

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


def with_free_memory(gpus: tuple[Gpu, ...], library: ModuleType | None = None) -> tuple[Gpu, ...]:
    """Return the GPUs with their free memory, if NVML knows it."""
    # NVML numbers GPUs in its own order, so find them by PCI address. A MIG device has the address
    # of the whole GPU, whose free memory is not the device's.
    if all(gpu.pci_bus_id is None or gpu.is_slice for gpu in gpus):
        return gpus
    # Imported here, because the import takes 0.1 s and few commands need it.
    nvml = library or importlib.import_module("pynvml")

    def free_bytes(gpu: Gpu) -> int | None:
        if gpu.pci_bus_id is None or gpu.is_slice:
            return None
        with contextlib.suppress(nvml.NVMLError):
            device = nvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_bus_id.encode())
            return int(nvml.nvmlDeviceGetMemoryInfo(device).free)
        return None

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return gpus
    try:
        return tuple(replace(gpu, free_memory_bytes=free_bytes(gpu)) for gpu in gpus)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


T = TypeVar("T")

PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
# PCI classes of display and 3D controllers, without the last byte (programming interface)
_GPU_CLASSES = ("0x0300", "0x0302")


def probe_machine() -> Machine:
    """Return the facts about this machine. Never raises."""
    unknown: dict[Fact, str] = {}

    def ask(fact: Fact, probe: Callable[[], T], otherwise: T) -> T:
        try:
            return probe()
        except Exception as error:
            # A probe may fail in any way; then its fact is unknown and other probes go on.
            unknown[fact] = f"{type(error).__name__}: {error}"
            return otherwise

    no_gpus: tuple[tuple[Gpu, ...], str] = ((), "the driver cannot be read")
    found, driver_error = ask("gpus", _find_gpus, no_gpus)
    gpus = with_free_memory(found)
    has_affinity = hasattr(os, "sched_getaffinity")  # cores that this process may run on
    shm_bytes, shm_free_bytes = ask("shm", host.shared_memory, (0, 0))
    return Machine(
        system=platform.system(),
        num_cpus=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        has_native_bf16=host.has_native_bf16(),
        memory_bytes=ask("memory", host.memory_bytes, 0),
        gpus=gpus,
        has_hidden_gpus=not gpus and _has_pci_gpus(),
        driver_error=driver_error,
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        rdma_devices=tuple(sorted(path.name for path in host.RDMA_FOLDER.glob("*"))),
        unknown=unknown,
    )


def _find_gpus() -> tuple[tuple[Gpu, ...], str]:
    try:
        return read_gpus(), ""
    except DriverError as error:
        return (), str(error)


def _has_pci_gpus() -> bool:
    """Return True if NVIDIA GPUs are on the PCI bus, visible or not. NIXL checks the same."""
    return any(
        host.first_line(device / "vendor") == _NVIDIA
        and host.first_line(device / "class").startswith(_GPU_CLASSES)
        for device in (PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ())
    )
