"""Probes this machine in well under a second, and records why a fact cannot be found.

NVML gives the links between GPUs and their free memory.

No torch, no CUDA context. Sources: nvml.h of CUDA 12 and 13; PCI Express base specification.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pdlaunch.machine.cuda_driver import DriverError, read_gpus
from pdlaunch.machine.facts import Fact, Gpu, GpuLink, LinkKind, Machine
from pdlaunch.machine.host import (
    RDMA_FOLDER,
    first_line,
    has_native_bf16,
    memory_bytes,
    shared_memory,
    usable_cpus,
)

_P2P_READ, _P2P_NVLINK = 0, 2
_SAME_CPU = 40  # common ancestor in the PCIe tree: anything up to a NUMA node; 50 is another socket
_LANE_GIGABYTES_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Speed of a lane by PCIe generation, one way, after its line code."""


class NvmlError(Exception):
    """NVML is not there, or refuses."""


def read_nvml_facts(
    gpus: tuple[Gpu, ...], library: ModuleType | None = None
) -> tuple[tuple[Gpu, ...], tuple[GpuLink, ...]]:
    """Return the GPUs with their free memory, and the links of which NVML knows enough.

    Without NVML the GPUs are returned as they are. ``library``: ``pynvml``, or what stands in for
    it in tests.
    """
    # NVML numbers GPUs in its own order, so it is asked by address. The address of a MIG device is
    # that of the whole GPU, whose memory and links are not its own.
    whole = [gpu for gpu in gpus if gpu.pci_bus_id is not None and not gpu.is_slice]
    if not whole:
        return gpus, ()
    # Imported here: it takes a tenth of a second, which few commands need.
    nvml = _Nvml(library or importlib.import_module("pynvml"))
    try:
        nvml.ask("nvmlInit")
    except NvmlError:
        return gpus, ()
    try:
        free = {gpu.index: nvml.free_memory_bytes(gpu) for gpu in whole}
        links = [nvml.link(*pair) for pair in itertools.combinations(whole, 2)]
    finally:
        with contextlib.suppress(NvmlError):
            nvml.ask("nvmlShutdown")
    known = tuple(replace(gpu, free_memory_bytes=free.get(gpu.index)) for gpu in gpus)
    return known, tuple(link for link in links if link is not None)


class _Nvml:
    """Asks NVML about GPUs; answers are None if NVML does not know."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def ask(self, name: str, *arguments: object) -> Any:
        """Call a function of NVML. Raises NvmlError."""
        try:
            return getattr(self._library, name)(*arguments)
        except self._library.NVMLError as error:
            raise NvmlError(f"{name}: {error}") from None

    def free_memory_bytes(self, gpu: Gpu) -> int | None:
        try:
            return int(self.ask("nvmlDeviceGetMemoryInfo", self._device(gpu)).free)
        except NvmlError:
            return None

    def link(self, first: Gpu, second: Gpu) -> GpuLink | None:
        """Return the link between two GPUs.

        None: they cannot read each other, or the speed of their link is not known.
        """
        try:
            kind, speed, text = self._link(first, second)
        except NvmlError:
            return None
        if not speed:
            return None
        return GpuLink(first.index, second.index, kind, speed, f"{text} with {speed:.3g} GB/s")

    def _link(self, first: Gpu, second: Gpu) -> tuple[LinkKind, float, str]:
        ends = (self._device(first), self._device(second))
        if self._can(_P2P_NVLINK, *ends):
            # The end with fewer links bounds the pair.
            speeds = min(self._nvlinks(ends[0], second), self._nvlinks(ends[1], first), key=sum)
            return "NVLink", sum(speeds), f"{len(speeds)} NVLinks"
        # The speed between two sockets is not known.
        near = self.ask("nvmlDeviceGetTopologyCommonAncestor", *ends) <= _SAME_CPU
        generation = min(self.ask("nvmlDeviceGetMaxPcieLinkGeneration", end) for end in ends)
        lanes = min(self.ask("nvmlDeviceGetMaxPcieLinkWidth", end) for end in ends)
        is_joined = near and self._can(_P2P_READ, *ends)
        speed = lanes * _LANE_GIGABYTES_PER_S.get(generation, 0.0) if is_joined else 0.0
        return "PCIe", speed, f"PCIe {generation}.0 x{lanes}"

    def _nvlinks(self, device: object, peer: Gpu) -> list[float]:
        """Return the speeds of the active NVLinks that lead to a GPU or to a switch, in GB/s."""
        library, speeds = self._library, []
        for number in range(library.NVML_NVLINK_MAX_LINKS):
            try:
                if not self.ask("nvmlDeviceGetNvLinkState", device, number):
                    continue
            except NvmlError:
                break
            # In a virtual machine the other end can be out of sight: that is a switch.
            remote = None
            with contextlib.suppress(NvmlError):
                remote = self.ask("nvmlDeviceGetNvLinkRemoteDeviceType", device, number)
            if remote == library.NVML_NVLINK_DEVICE_TYPE_IBMNPU:
                continue
            if remote == library.NVML_NVLINK_DEVICE_TYPE_GPU:
                pci = self.ask("nvmlDeviceGetNvLinkRemotePciInfo", device, number)
                if (pci.domain, pci.bus, pci.device) != _address(peer):
                    continue
            speeds.append(self._nvlink_megabytes_per_s(device, number) / 1000)
        return speeds

    def _nvlink_megabytes_per_s(self, device: object, number: int) -> int:
        """Return the speed of a link, one way; 0: this driver does not know it."""
        library = self._library
        for field in (
            (library.NVML_FI_DEV_NVLINK_GET_SPEED, number),
            (library.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, 0),  # older drivers: one for all links
        ):
            (value,) = self.ask("nvmlDeviceGetFieldValues", device, [field])
            if value.nvmlReturn == 0 and value.valueType == library.NVML_VALUE_TYPE_UNSIGNED_INT:
                return int(value.value.uiVal)
        return 0

    def _can(self, way: int, first: object, second: object) -> bool:
        try:
            status = self.ask("nvmlDeviceGetP2PStatus", first, second, way)
        except NvmlError:
            return False
        return bool(status == self._library.NVML_P2P_STATUS_OK)

    def _device(self, gpu: Gpu) -> object:
        return self.ask("nvmlDeviceGetHandleByPciBusId", str(gpu.pci_bus_id).encode())


def _address(gpu: Gpu) -> tuple[int, int, int]:
    """Return domain, bus and device; CUDA and NVML write domains with more or fewer digits."""
    domain, bus, rest = str(gpu.pci_bus_id).split(":")
    return int(domain, 16), int(bus, 16), int(rest.partition(".")[0], 16)


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

    no_gpus: tuple[tuple[Gpu, ...], str] = ((), "the driver cannot be read")
    found, driver_error = ask("gpus", _find_gpus, no_gpus)
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
