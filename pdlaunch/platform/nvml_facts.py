"""Adds to the GPUs of this machine what NVML and the kernel know of them; never raises."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pdlaunch.platform.facts import Gpu, LinkedGpus
from pdlaunch.platform.gpu_links import Nvml, NvmlError, load_nvml, open_nvml

PCI_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class NvmlFacts:
    """Holds GPUs with their free memory and NUMA nodes, what joins them, and the driver."""

    gpus: tuple[Gpu, ...]
    links: tuple[LinkedGpus, ...] = ()
    driver_version: str | None = None


def read_nvml_facts(
    gpus: tuple[Gpu, ...],
    load: Callable[[], ctypes.CDLL] = load_nvml,
    pci_devices: Path = PCI_DEVICES,
) -> NvmlFacts:
    """Return what is known of these GPUs; without NVML they are returned as they are."""
    found = tuple(replace(gpu, numa_node=_numa_node(gpu, pci_devices)) for gpu in gpus)
    version: str | None = None
    if not found:
        return NvmlFacts(found)
    try:
        with open_nvml(load) as nvml:
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
