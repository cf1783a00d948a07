"""Describes machines as plain values, of which planning and rules are pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

# Imported by name: the probe does without pydantic, which reads these in files of machines.
from annotated_types import Ge

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
NumBytes = Annotated[int, Ge(0)]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Describes one CUDA device, in the order of CUDA_VISIBLE_DEVICES. None: not known."""

    index: int = 0
    name: str = "GPU"
    memory_bytes: NumBytes | None = None
    has_virtual_memory: bool | None = None
    """The driver can reserve, create and map memory (``cuMem*``) on it: CuMem pools work."""
    has_fabric_handles: bool | None = None
    """Allocations can be exported as fabric handles: the device says so and an IMEX channel is
    there.
    """
    pci_bus_id: str | None = None
    """Address on the PCI bus, by which NVML finds the device: ``0000:19:00.0``."""
    uuid: str | None = None
    """``GPU-696b7a86-ce15-a598-b879-e0a7533c23ed``; it begins with ``MIG-`` for a MIG device."""
    free_memory_bytes: NumBytes | None = None
    """Memory that no process holds; not known of a MIG device."""

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
class GpuLink:
    """Says what joins two GPUs of a machine."""

    first: int
    second: int  # indices, the lower one first
    kind: LinkKind
    gigabytes_per_s: float  # speed on the wires, one way; copies reach less
    text: str = ""  # ``18 NVLinks with 478 GB/s``


@dataclass(frozen=True, slots=True)
class Libraries:
    """Describes packages of this Python, found on disk without importing them."""

    torch: str | None = None  # version with its build (``2.13.0+cpu``); None: not installed
    torch_cuda: str | None = None  # CUDA version that torch was built for; None: built without CUDA
    transformers: str | None = None
    nixl: str | None = None
    nixl_backends: Mapping[str, str] = field(default_factory=dict)
    """Installed builds of NIXL and their versions: ``{"cu12": "1.5.1"}``; also ``rocm``."""
    mooncake: bool = False
    missing_for_mooncake: tuple[str, ...] = ()
    """Shared libraries that Mooncake needs and the loader does not find."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Describes this machine, or one that is assumed."""

    system: str = "Linux"
    num_cpus: Annotated[int, Ge(1)] = 1  # cores that a process may use
    has_native_bf16: bool = False
    """The CPU multiplies bfloat16 by itself; emulated it is several times slower."""
    memory_bytes: NumBytes = 0  # memory of the machine or of its control group, whichever is less
    gpus: tuple[Gpu, ...] = ()
    has_hidden_gpus: bool = False
    """NVIDIA GPUs are on the PCI bus, of which this process sees none: CUDA_VISIBLE_DEVICES hides
    them, or a container was not given them.
    """
    gpu_links: tuple[GpuLink, ...] = ()  # pairs of GPUs whose link NVML knows
    driver_cuda: tuple[int, int] | None = None
    """Newest CUDA version that the driver runs; None: no driver."""
    driver_error: str = "no CUDA device is visible"  # the reason why there are no GPUs
    libraries: Libraries = field(default_factory=Libraries)
    num_open_files: int = UNLIMITED  # the hard limit, to which processes raise their soft one
    shm_bytes: NumBytes = 0  # size of /dev/shm
    shm_free_bytes: NumBytes = 0
    rdma_devices: tuple[str, ...] = ()
    unknown: Mapping[Fact, str] = field(default_factory=dict)
    """The reasons why facts are missing, by fact."""

    @property
    def cumem_problem(self) -> str:
        """Return why CuMem pools do not work here; empty: they do."""
        if self.system != "Linux":
            return f"CuMem pools need Linux; this is {self.system}"
        if not self.gpus:
            return self.driver_error
        without = [str(gpu.index) for gpu in self.gpus if not gpu.has_virtual_memory]
        devices = ", ".join(without)
        return f"no virtual memory management on device {devices}" if without else ""


def unknown_of_gpus(gpus: Iterable[Gpu]) -> set[Fact]:
    """Return the facts that are not known of all these GPUs."""
    of_gpus: dict[Fact, list[object]] = {
        "gpu_memory": [gpu.memory_bytes for gpu in gpus],
        "fabric": [gpu.has_fabric_handles for gpu in gpus],
        "cumem": [gpu.has_virtual_memory for gpu in gpus],
    }
    return {fact for fact, values in of_gpus.items() if None in values}
