"""Describes machines as plain values, of which planning and rules are pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

# Groups of facts that can be unknown
Fact = Literal[
    "cpus",
    "memory",
    "gpus",
    "gpu_memory",
    "fabric",
    "cumem",
    "shm",
]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Describes one CUDA device, in the order of CUDA_VISIBLE_DEVICES. None: not known."""

    index: int = 0
    name: str = "GPU"
    memory_bytes: int | None = None
    # The driver can reserve, create and map memory (``cuMem*``) on it: CuMem pools work
    has_virtual_memory: bool | None = None
    # Allocations can be exported as fabric handles: the device says so and an IMEX channel is there
    has_fabric_handles: bool | None = None
    # Address on the PCI bus, by which NVML finds the device: ``0000:19:00.0``
    pci_bus_id: str | None = None
    free_memory_bytes: int | None = None  # Memory that no process holds; not known of a MIG device

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
class Machine:
    """Describes this machine, or one that is assumed."""

    system: str = "Linux"
    num_cpus: int = 1  # cores that a process may use
    # The CPU multiplies bfloat16 by itself; emulated it is several times slower
    has_native_bf16: bool = False
    memory_bytes: int = 0  # memory of the machine or of its control group, whichever is less
    gpus: tuple[Gpu, ...] = ()
    # NVIDIA GPUs are on the PCI bus, of which this process sees none: CUDA_VISIBLE_DEVICES hides
    # them, or a container was not given them
    has_hidden_gpus: bool = False
    driver_error: str = "no CUDA device is visible"  # the reason why there are no GPUs
    shm_bytes: int = 0  # size of /dev/shm
    shm_free_bytes: int = 0
    rdma_devices: tuple[str, ...] = ()
    # The reasons why facts are missing, by fact
    unknown: Mapping[Fact, str] = field(default_factory=dict)

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
