"""Asks NVML what joins two GPUs of this host (NVLink or PCIe, and how much its wires carry), and
how much memory of a GPU is free.

Without torch; creates no CUDA context.

Sources: nvml.h of CUDA 12 and 13 (numbers, layouts); PCI Express base specification (speeds and
encodings).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pdlaunch.machine.facts import LinkKind
from pdlaunch.machine.library_calls import LibraryCalls

LIBRARY = "libnvidia-ml.so.1"
MOST_LINKS = 64
"""Links of one GPU that are asked for at most; NVML says sooner that there are no more."""

_P2P_READ = 0
_P2P_NVLINK = 2
_P2P_OK = 0
_ACTIVE = 1
_REMOTE_GPU = 0
_REMOTE_CPU = 1
_FIELD_LINK_SPEED = 164
"""Speed of the link in scopeId, MB/s (10^6 bytes) each way."""
_FIELD_COMMON_SPEED = 90
"""Speed of every active link; drivers that do not know the field above have it."""
_UNSIGNED_INT = 1
_SAME_CPU = 40
"""Common ancestor in the PCIe tree: anything up to a NUMA node; 50 is another socket."""

_LANE_GIGABYTES_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Speed of a lane by PCIe generation, one way, after its line code."""

BusPair = tuple[str, str]
"""PCI addresses of two GPUs, as CUDA writes them: ``0000:19:00.0``."""


class NvmlError(Exception):
    """Says that NVML is not there or refuses; the text names the call."""


@dataclass(frozen=True, slots=True)
class GpuLink:
    """Describes what joins two GPUs."""

    kind: LinkKind
    gigabytes_per_s: float
    """Speed on the wires, one way; copies reach less."""
    text: str
    """``18 NVLinks with 478 GB/s``"""


def load_nvml(name: str = LIBRARY) -> ctypes.CDLL:
    """Load NVML. Raises NvmlError where there is no driver."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NvmlError(f"no NVML: {error}") from None


def read_gpu_links(
    pairs: Iterable[BusPair], load: Callable[[], ctypes.CDLL] = load_nvml
) -> dict[BusPair, GpuLink]:
    """Return the links of those pairs about which NVML knows enough; never raises."""
    wanted = dict.fromkeys(pairs)
    if not wanted:
        return {}
    try:
        with open_nvml(load) as nvml:
            links = {pair: _known_link(nvml, *pair) for pair in wanted}
    except NvmlError:
        return {}
    return {pair: link for pair, link in links.items() if link is not None}


@contextlib.contextmanager
def open_nvml(load: Callable[[], ctypes.CDLL] = load_nvml) -> Iterator[Nvml]:
    """Open NVML for as long as the scope lasts. Raises NvmlError."""
    calls = _Calls(load())
    calls("nvmlInit_v2")
    try:
        yield Nvml(calls)
    finally:
        calls("nvmlShutdown")


@dataclass(frozen=True, slots=True)
class NvLink:
    """Describes one active NVLink of a GPU."""

    gigabytes_per_s: float
    """Speed one way."""
    peer: tuple[int, int, int] | None
    """PCI domain, bus and device of the GPU at its other end; None: a switch, which leads to every
    GPU.
    """


class Nvml:
    """Answers questions about GPUs, named by PCI addresses. Each method raises NvmlError."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._nvlinks: dict[str, list[NvLink]] = {}

    def driver_version(self) -> str:
        version = ctypes.create_string_buffer(80)
        self._calls("nvmlSystemGetDriverVersion", version, len(version))
        return version.value.decode()

    def free_memory_bytes(self, bus_id: str) -> int:
        """Return the memory of a GPU that neither a process nor the driver holds."""
        memory = _Memory()
        self._calls("nvmlDeviceGetMemoryInfo", self._device(bus_id), ctypes.byref(memory))
        return int(memory.free)

    def link(self, first: str, second: str) -> GpuLink | None:
        """Return the link between two GPUs.

        None: they are one GPU, cannot read each other, or nobody says what their link carries.
        """
        if first == second:
            return None
        if self._can(_P2P_NVLINK, first, second):
            return self._nvlink_between(first, second)
        if self._can(_P2P_READ, first, second) and self._on_one_cpu(first, second):
            return self._pcie_between(first, second)
        return None

    def nvlinks(self, bus_id: str) -> list[NvLink]:
        """Return the active NVLinks that do not lead to a CPU."""
        if bus_id not in self._nvlinks:
            device = self._device(bus_id)
            found = (self._nvlink(device, number) for number in self._active(device))
            self._nvlinks[bus_id] = [link for link in found if link is not None]
        return self._nvlinks[bus_id]

    def pcie(self, bus_id: str) -> tuple[int, int]:
        """Return the PCIe generation and number of lanes that GPU and slot both have.

        An idle GPU drives less of it.
        """
        device = self._device(bus_id)
        return (
            self._calls.read_uint("nvmlDeviceGetMaxPcieLinkGeneration", device),
            self._calls.read_uint("nvmlDeviceGetMaxPcieLinkWidth", device),
        )

    def _nvlink_between(self, first: str, second: str) -> GpuLink | None:
        ends = self._nvlinks_to(first, second), self._nvlinks_to(second, first)
        speed, count = min(
            (sum(link.gigabytes_per_s for link in links), len(links)) for links in ends
        )
        return GpuLink("NVLink", speed, f"{count} NVLinks with {speed:.3g} GB/s") if speed else None

    def _nvlinks_to(self, bus_id: str, peer: str) -> list[NvLink]:
        return [link for link in self.nvlinks(bus_id) if link.peer in (None, _address(peer))]

    def _pcie_between(self, first: str, second: str) -> GpuLink | None:
        (generation, lanes), other = self.pcie(first), self.pcie(second)
        generation, lanes = min(generation, other[0]), min(lanes, other[1])
        speed = lanes * _LANE_GIGABYTES_PER_S.get(generation, 0.0)
        return (
            GpuLink("PCIe", speed, f"PCIe {generation}.0 x{lanes} with {speed:.3g} GB/s")
            if speed
            else None
        )

    def _active(self, device: ctypes.c_void_p) -> Iterator[int]:
        for number in range(MOST_LINKS):
            try:
                state = self._calls.read_uint("nvmlDeviceGetNvLinkState", device, number)
            except NvmlError:
                return
            if state == _ACTIVE:
                yield number

    def _nvlink(self, device: ctypes.c_void_p, number: int) -> NvLink | None:
        # In a virtual machine the other end can be out of sight: a switch, which is not given to it
        # as the GPUs are.
        remote = self._calls.find_uint("nvmlDeviceGetNvLinkRemoteDeviceType", device, number)
        if remote == _REMOTE_CPU:
            return None
        speed = self._field(device, _FIELD_LINK_SPEED, number) or self._field(
            device, _FIELD_COMMON_SPEED, 0
        )
        return NvLink(
            speed / 1000, self._remote_address(device, number) if remote == _REMOTE_GPU else None
        )

    def _remote_address(self, device: ctypes.c_void_p, number: int) -> tuple[int, int, int]:
        pci = _PciInfo()
        self._calls("nvmlDeviceGetNvLinkRemotePciInfo_v2", device, number, ctypes.byref(pci))
        return pci.domain, pci.bus, pci.device

    def _field(self, device: ctypes.c_void_p, field: int, scope: int) -> int:
        """Read a field of a device; 0: this driver does not know it."""
        value = _FieldValue(field_id=field, scope_id=scope)
        self._calls("nvmlDeviceGetFieldValues", device, 1, ctypes.byref(value))
        return int(value.unsigned) if value.code == 0 and value.value_type == _UNSIGNED_INT else 0

    def _can(self, way: int, first: str, second: str) -> bool:
        return (
            self._calls.find_uint(
                "nvmlDeviceGetP2PStatus", self._device(first), self._device(second), way
            )
            == _P2P_OK
        )

    def _on_one_cpu(self, first: str, second: str) -> bool:
        """Return whether both GPUs are at one CPU: the link between two sockets is not known."""
        ancestor = self._calls.read_uint(
            "nvmlDeviceGetTopologyCommonAncestor", self._device(first), self._device(second)
        )
        return ancestor <= _SAME_CPU

    def _device(self, bus_id: str) -> ctypes.c_void_p:
        device = ctypes.c_void_p()
        self._calls("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(device))
        return device


class _Calls(LibraryCalls):
    error = NvmlError
    owner = "NVML"

    def read_uint(self, name: str, *arguments: object) -> int:
        """Call a function whose last parameter is where NVML writes an unsigned int."""
        value = ctypes.c_uint()
        self(name, *arguments, ctypes.byref(value))
        return value.value

    def find_uint(self, name: str, *arguments: object) -> int | None:
        """Do as ``read_uint``; None: NVML cannot tell."""
        try:
            return self.read_uint(name, *arguments)
        except NvmlError:
            return None


class _Memory(ctypes.Structure):
    """Mirrors nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _PciInfo(ctypes.Structure):
    _fields_ = (
        ("bus_id_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pci_device_id", ctypes.c_uint),
        ("pci_subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


class _FieldValue(ctypes.Structure):
    """Mirrors nvmlFieldValue_t; an unsigned int takes the first 4 of the value's 8 bytes."""

    _fields_ = (
        ("field_id", ctypes.c_uint),
        ("scope_id", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_uint),
        ("code", ctypes.c_uint),
        ("unsigned", ctypes.c_uint),
        ("rest", ctypes.c_uint),
    )


def _known_link(nvml: Nvml, first: str, second: str) -> GpuLink | None:
    try:
        return nvml.link(first, second)
    except NvmlError:
        return None


def _address(bus_id: str) -> tuple[int, int, int]:
    """Return domain, bus and device; CUDA and NVML write domains with more or fewer digits."""
    domain, bus, rest = bus_id.split(":")
    return int(domain, 16), int(bus, 16), int(rest.partition(".")[0], 16)
