"""Asks NVML what joins two GPUs of this host, and how much memory of a GPU is free.

No torch, no CUDA context. Sources: nvml.h of CUDA 12 and 13; PCI Express base specification.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pdlaunch.machine.facts import LinkKind

_P2P_READ, _P2P_NVLINK = 0, 2
_SAME_CPU = 40  # common ancestor in the PCIe tree: anything up to a NUMA node; 50 is another socket
_LANE_GIGABYTES_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Speed of a lane by PCIe generation, one way, after its line code."""

BusPair = tuple[str, str]  # PCI addresses of two GPUs, as CUDA writes them: ``0000:19:00.0``


class NvmlError(Exception):
    """NVML is not there, or refuses."""


@dataclass(frozen=True, slots=True)
class GpuLink:
    kind: LinkKind
    gigabytes_per_s: float  # speed on the wires, one way; copies reach less
    text: str  # ``18 NVLinks with 478 GB/s``


def read_gpu_links(
    pairs: Iterable[BusPair], library: ModuleType | None = None
) -> dict[BusPair, GpuLink]:
    """Return the links of those pairs about which NVML knows enough; never raises."""
    found: dict[BusPair, GpuLink] = {}
    wanted = dict.fromkeys(pairs)
    if not wanted:
        return found
    with contextlib.suppress(NvmlError), open_nvml(library) as nvml:
        for pair in wanted:
            with contextlib.suppress(NvmlError):
                if link := nvml.link(*pair):
                    found[pair] = link
    return found


@contextlib.contextmanager
def open_nvml(library: ModuleType | None = None) -> Iterator[Nvml]:
    """Open NVML for as long as the scope lasts. Raises NvmlError.

    ``library``: ``pynvml``, or what stands in for it in tests.
    """
    # Imported here: it takes a tenth of a second, which few commands need.
    nvml = Nvml(library or importlib.import_module("pynvml"))
    nvml.ask("nvmlInit")
    try:
        yield nvml
    finally:
        nvml.ask("nvmlShutdown")


class Nvml:
    """Answers questions about GPUs, named by PCI addresses. Each method raises NvmlError."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def ask(self, name: str, *arguments: object) -> Any:
        try:
            return getattr(self._library, name)(*arguments)
        except self._library.NVMLError as error:
            raise NvmlError(f"{name}: {error}") from None

    def driver_version(self) -> str:
        return str(self.ask("nvmlSystemGetDriverVersion"))

    def free_memory_bytes(self, bus_id: str) -> int:
        """Return the memory of a GPU that neither a process nor the driver holds."""
        return int(self.ask("nvmlDeviceGetMemoryInfo", self._device(bus_id)).free)

    def link(self, first: str, second: str) -> GpuLink | None:
        """Return the link between two GPUs.

        None: they are one GPU, cannot read each other, or nobody says what their link carries.
        """
        ends = (self._device(first), self._device(second))
        if first == second:
            return None
        if self._can(_P2P_NVLINK, *ends):
            speeds = min(self._nvlinks(ends[0], second), self._nvlinks(ends[1], first), key=sum)
            total, count = sum(speeds), len(speeds)
            text = f"{count} NVLinks with {total:.3g} GB/s"
            return GpuLink("NVLink", total, text) if total else None
        # The link between two sockets is not known.
        near = self.ask("nvmlDeviceGetTopologyCommonAncestor", *ends) <= _SAME_CPU
        if not near or not self._can(_P2P_READ, *ends):
            return None
        generation = min(self.ask("nvmlDeviceGetMaxPcieLinkGeneration", end) for end in ends)
        lanes = min(self.ask("nvmlDeviceGetMaxPcieLinkWidth", end) for end in ends)
        speed = lanes * _LANE_GIGABYTES_PER_S.get(generation, 0.0)
        text = f"PCIe {generation}.0 x{lanes} with {speed:.3g} GB/s"
        return GpuLink("PCIe", speed, text) if speed else None

    def _nvlinks(self, device: object, peer: str) -> list[float]:
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
            (library.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, 0),
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

    def _device(self, bus_id: str) -> object:
        return self.ask("nvmlDeviceGetHandleByPciBusId", bus_id.encode())


def _address(bus_id: str) -> tuple[int, int, int]:
    """Return domain, bus and device; CUDA and NVML write domains with more or fewer digits."""
    domain, bus, rest = bus_id.split(":")
    return int(domain, 16), int(bus, 16), int(rest.partition(".")[0], 16)
