"""Describes machines as plain values, of which planning and rules are pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

UNLIMITED = -1  # stands for a limit that is not set

Fact = Literal[
    "system",
    "cpus",
    "native_bf16",
    "memory",
    "gpus",
    "gpu_memory",
    "fabric",
    "driver",
    "cumem",
    "libraries",
    "limits",
    "shm",
    "rdma",
]
"""Groups of facts that can be unknown."""

LinkKind = Literal["NVLink", "PCIe"]


@dataclass(frozen=True, slots=True)
class Availability:
    """Says whether something can be used here, and which probe said so."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """Describes one CUDA device, in the order of CUDA_VISIBLE_DEVICES. None: not known."""

    index: int
    name: str = "GPU"
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    has_virtual_memory: bool | None = None
    """The driver can reserve, create and map memory (``cuMem*``) on it."""
    has_fabric_handles: bool | None = None
    """Allocations can be exported as fabric handles: the device says so and an IMEX channel is
    there.
    """
    pci_bus_id: str | None = None
    """Address on the PCI bus, by which NVML finds the device: ``0000:19:00.0``."""
    uuid: str | None = None
    """``GPU-696b7a86-ce15-a598-b879-e0a7533c23ed``; it begins with ``MIG-`` for a MIG device."""
    free_memory_bytes: int | None = None  # memory that no process holds; not known of a MIG device
    numa_node: int | None = None

    @property
    def held_bytes(self) -> int:
        """Return the memory that processes hold now; 0 where that is not known."""
        if self.memory_bytes is None or self.free_memory_bytes is None:
            return 0
        return max(0, self.memory_bytes - self.free_memory_bytes)

    @property
    def is_slice(self) -> bool:
        """Return True for a MIG device: part of a GPU, with no way to the memory of other GPUs."""
        return "MIG" in self.name.split()


@dataclass(frozen=True, slots=True)
class LinkedGpus:
    """Says what joins two GPUs of a machine."""

    first: int
    second: int  # indices, the lower one first
    kind: LinkKind
    gigabytes_per_s: float  # speed on the wires, one way


@dataclass(frozen=True, slots=True)
class NixlInstall:
    """Describes the NIXL packages of this Python."""

    version: str | None = None  # none: the ``nixl`` package is not installed
    backends: Mapping[str, str] = field(default_factory=dict)
    """Installed builds and their versions: ``{"cu12": "1.5.1"}``; also ``rocm``."""


@dataclass(frozen=True, slots=True)
class Libraries:
    """Describes packages of this Python, found on disk without importing them."""

    torch: str | None = None  # version with its build (``2.13.0+cpu``); None: not installed
    torch_cuda: str | None = None  # CUDA version that torch was built for; None: built without CUDA
    transformers: str | None = None
    nixl: NixlInstall = field(default_factory=NixlInstall)
    mooncake: bool = False
    missing_for_mooncake: tuple[str, ...] = ()
    """Shared libraries that Mooncake needs and the loader does not find."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds the resource limits of this process; UNLIMITED where there is none."""

    memlock_bytes: int
    num_open_files: int


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Describes ``/dev/shm``."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class PortState:
    """Says whether an address can be listened on."""

    problem: Literal["busy", "privileged", "not here", "unknown host", "other"] | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Describes this machine, or one that is assumed."""

    system: str = "Linux"
    architecture: str = "x86_64"
    cpus: tuple[int, ...] = (0,)  # cores that this process may use
    has_native_bf16: bool = False
    """The CPU multiplies bfloat16 by itself; emulated it is several times slower."""
    memory_bytes: int = 0  # memory of the machine or of its control group, whichever is less
    gpus: tuple[Gpu, ...] = ()
    has_hidden_gpus: bool = False
    """NVIDIA GPUs are on the PCI bus, of which this process sees none: CUDA_VISIBLE_DEVICES hides
    them, or a container was not given them. Files of machines do not tell.
    """
    gpu_links: tuple[LinkedGpus, ...] = ()  # the pairs of GPUs of which NVML knows the link
    driver_cuda: tuple[int, int] | None = None
    """Newest CUDA version that the driver runs; None: no driver."""
    driver_version: str | None = None
    """The driver's own version: ``580.82.07``. None: there is no driver, or NVML does not tell; no
    ``Fact`` says so, and a rule about it has to look for None itself.
    """
    numa_nodes: tuple[tuple[int, ...], ...] | None = None  # the cores of each NUMA node
    cumem: Availability = Availability(False, "not probed")
    libraries: Libraries = field(default_factory=Libraries)
    limits: Limits = Limits(UNLIMITED, UNLIMITED)
    shm: SharedMemory = SharedMemory(0, 0)
    rdma_devices: tuple[str, ...] = ()
    unknown: Mapping[Fact, str] = field(default_factory=dict)
    """Facts that could not be probed, and why."""
