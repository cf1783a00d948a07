"""Probes this machine in well under a second. Source: nvml.h of CUDA 12 and 13."""

import contextlib
import importlib
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pdlaunch.machine.cuda_driver import DriverError, read_gpus
from pdlaunch.machine.facts import Fact, Gpu, Machine
from pdlaunch.machine.host import (
    RDMA_FOLDER,
    first_line,
    has_native_bf16,
    memory_bytes,
    shared_memory,
    usable_cpus,
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
    shm_bytes, shm_free_bytes = ask("shm", shared_memory, (0, 0))
    return Machine(
        system=platform.system(),
        num_cpus=len(usable_cpus()),
        has_native_bf16=has_native_bf16(),
        memory_bytes=ask("memory", memory_bytes, 0),
        gpus=gpus,
        has_hidden_gpus=not gpus and _has_pci_gpus(),
        driver_error=driver_error,
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        rdma_devices=tuple(sorted(path.name for path in RDMA_FOLDER.glob("*"))),
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
        first_line(device / "vendor") == _NVIDIA
        and first_line(device / "class").startswith(_GPU_CLASSES)
        for device in (PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ())
    )
