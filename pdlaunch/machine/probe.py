"""Probes this machine in well under a second, and records why a fact cannot be found.

No torch, no CUDA context. Source: nvml.h of CUDA 12 and 13.
"""

from __future__ import annotations

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
    """Return the GPUs with the memory that is free, as far as NVML tells.

    ``library``: ``pynvml``, or what stands in for it in tests.
    """
    # NVML numbers GPUs in its own order, so it is asked by address. The address of a MIG device is
    # that of the whole GPU, whose memory is not its own.
    if all(gpu.pci_bus_id is None or gpu.is_slice for gpu in gpus):
        return gpus
    # Imported here: it takes a tenth of a second, which few commands need.
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
# PCI classes of display and 3D controllers, without the byte of the interface
_GPU_CLASSES = ("0x0300", "0x0302")


def probe_machine() -> Machine:
    """Return what this machine is; never raises."""
    unknown: dict[Fact, str] = {}

    def ask(fact: Fact, probe: Callable[[], T], otherwise: T) -> T:
        try:
            return probe()
        except Exception as error:
            # Whatever a machine does to a probe: the fact is unknown, nothing else fails.
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
        rdma_devices=_rdma_devices(),
        unknown=unknown,
    )


def _find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the driver's GPUs, or why there are none: that too is a fact."""
    try:
        return read_gpus(), ""
    except DriverError as error:
        return (), str(error)


def _rdma_devices() -> tuple[str, ...]:
    folder = RDMA_FOLDER
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def _has_pci_gpus() -> bool:
    """Return whether NVIDIA GPUs are on the PCI bus, seen or not; NIXL looks there."""
    return any(
        first_line(device / "vendor") == _NVIDIA
        and first_line(device / "class").startswith(_GPU_CLASSES)
        for device in (PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ())
    )
