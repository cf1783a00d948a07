"""Probes every fact about this machine in well under a second; names what cannot be found out."""

from __future__ import annotations

import contextlib
import itertools
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pdlaunch.machine.cuda_driver import Driver, DriverError, judge_cumem, probe_cumem, read_driver
from pdlaunch.machine.facts import (
    UNLIMITED,
    Fact,
    Gpu,
    Libraries,
    Limits,
    LinkedGpus,
    Machine,
    SharedMemory,
)
from pdlaunch.machine.host import (
    RDMA_FOLDER,
    find_libraries,
    first_line,
    has_native_bf16,
    memory_bytes,
    numa_nodes,
    read_limits,
    read_shared_memory,
    usable_cpus,
)
from pdlaunch.machine.nvml import Nvml, NvmlError, open_nvml

T = TypeVar("T")

PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")
"""PCI classes of display and 3D controllers, without the byte of the interface."""


def probe_machine() -> Machine:
    """Return what this machine is; never raises."""
    probes = _Probes()
    # A driver that cannot be read makes "gpus" unknown, and not "driver", which assumed machines
    # alone may lack: a rule about the driver needs both.
    driver = probes.ask("gpus", _read_driver, None)
    of_gpus = read_nvml_facts(driver.gpus if driver else ())
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cpus=usable_cpus(),
        has_native_bf16=has_native_bf16(),
        memory_bytes=probes.ask("memory", memory_bytes, 0),
        gpus=of_gpus.gpus,
        has_hidden_gpus=not of_gpus.gpus and _has_pci_gpus(),
        gpu_links=of_gpus.links,
        driver_version=of_gpus.driver_version,
        numa_nodes=numa_nodes(),
        driver_cuda=driver.cuda_version if driver else None,
        cumem=judge_cumem(driver) if driver else probe_cumem(),
        libraries=probes.ask("libraries", find_libraries, Libraries()),
        limits=probes.ask("limits", read_limits, Limits(UNLIMITED, UNLIMITED)),
        shm=probes.ask("shm", read_shared_memory, SharedMemory(0, 0)),
        rdma_devices=probes.ask("rdma", _rdma_devices, ()),
        unknown=probes.unknown,
    )


class _Probes:
    """Asks probes, and keeps the reasons of those that cannot answer."""

    def __init__(self) -> None:
        self.unknown: dict[Fact, str] = {}

    def ask(self, fact: Fact, probe: Callable[[], T], otherwise: T) -> T:
        try:
            return probe()
        except Exception as error:
            # Whatever a machine does to a probe: the fact is unknown, nothing else fails.
            self.unknown[fact] = f"{type(error).__name__}: {error}"
            return otherwise


def _read_driver() -> Driver | None:
    """Return None where there is no CUDA device, which is a fact and not a failed probe."""
    try:
        return read_driver()
    except DriverError:
        return None


def _rdma_devices() -> tuple[str, ...]:
    return (
        tuple(sorted(path.name for path in RDMA_FOLDER.iterdir())) if RDMA_FOLDER.is_dir() else ()
    )


def _has_pci_gpus() -> bool:
    """Return whether NVIDIA GPUs are on the PCI bus, seen or not; NIXL looks there."""
    return any(
        first_line(device / "vendor") == _NVIDIA
        and first_line(device / "class").startswith(_GPU_CLASSES)
        for device in (PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ())
    )


@dataclass(frozen=True, slots=True)
class NvmlFacts:
    """Holds GPUs with their free memory and NUMA nodes, what joins them, and the driver."""

    gpus: tuple[Gpu, ...]
    links: tuple[LinkedGpus, ...] = ()
    driver_version: str | None = None


def read_nvml_facts(
    gpus: tuple[Gpu, ...],
    library: ModuleType | None = None,
    pci_devices: Path = PCI_DEVICES,
) -> NvmlFacts:
    """Return what is known of these GPUs; without NVML they are returned as they are."""
    found = tuple(replace(gpu, numa_node=_numa_node(gpu, pci_devices)) for gpu in gpus)
    version: str | None = None
    if not found:
        return NvmlFacts(found)
    try:
        with open_nvml(library) as nvml:
            with contextlib.suppress(NvmlError):
                version = nvml.driver_version()
            found = tuple(replace(gpu, free_memory_bytes=_free_bytes(nvml, gpu)) for gpu in found)
            return NvmlFacts(found, tuple(_links(nvml, found)), version)
    except NvmlError:
        return NvmlFacts(found, (), version)


def _free_bytes(nvml: Nvml, gpu: Gpu) -> int | None:
    # The address of a MIG device is that of the whole GPU, whose memory is not its own.
    if gpu.pci_bus_id is None or gpu.is_slice:
        return None
    try:
        return nvml.free_memory_bytes(gpu.pci_bus_id)
    except NvmlError:
        return None


def _links(nvml: Nvml, gpus: tuple[Gpu, ...]) -> Iterator[LinkedGpus]:
    for first, second in itertools.combinations(gpus, 2):
        if first.pci_bus_id is None or second.pci_bus_id is None:
            continue
        if first.is_slice or second.is_slice:
            continue
        with contextlib.suppress(NvmlError):
            if link := nvml.link(first.pci_bus_id, second.pci_bus_id):
                yield LinkedGpus(first.index, second.index, link.kind, link.gigabytes_per_s)


def _numa_node(gpu: Gpu, pci_devices: Path) -> int | None:
    """Return the GPU's NUMA node; None where the kernel names none (-1) or is not asked."""
    if gpu.pci_bus_id is None:
        return None
    try:
        node = int((pci_devices / gpu.pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
