"""Probes every fact about this machine in well under a second; names what cannot be found out."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pdlaunch.machine.cuda_driver import DriverError, read_driver
from pdlaunch.machine.facts import UNLIMITED, Fact, Gpu, Libraries, Machine
from pdlaunch.machine.host import (
    RDMA_FOLDER,
    find_libraries,
    first_line,
    has_native_bf16,
    max_open_files,
    memory_bytes,
    shared_memory,
    usable_cpus,
)
from pdlaunch.machine.nvml import read_nvml_facts

T = TypeVar("T")

PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")
"""PCI classes of display and 3D controllers, without the byte of the interface."""


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

    # A driver that cannot be read makes "gpus" unknown, and not "driver", which assumed machines
    # alone may lack: a rule about the driver needs both.
    no_driver: _DriverFacts = (None, (), "the driver cannot be read")
    cuda, found, driver_error = ask("gpus", _read_driver, no_driver)
    gpus, links = read_nvml_facts(found)
    shm_bytes, shm_free_bytes = ask("shm", shared_memory, (0, 0))
    return Machine(
        system=platform.system(),
        num_cpus=len(usable_cpus()),
        has_native_bf16=has_native_bf16(),
        memory_bytes=ask("memory", memory_bytes, 0),
        gpus=gpus,
        has_hidden_gpus=not gpus and _has_pci_gpus(),
        gpu_links=links,
        driver_cuda=cuda,
        driver_error=driver_error,
        libraries=ask("libraries", find_libraries, Libraries()),
        num_open_files=ask("limits", max_open_files, UNLIMITED),
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        rdma_devices=ask("rdma", _rdma_devices, ()),
        unknown=unknown,
    )


_DriverFacts = tuple[tuple[int, int] | None, tuple[Gpu, ...], str]


def _read_driver() -> _DriverFacts:
    """Return the driver's CUDA version, its GPUs, or why there are none: that too is a fact."""
    try:
        driver = read_driver()
    except DriverError as error:
        return None, (), str(error)
    return driver.cuda_version, driver.gpus, ""


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
