"""Describes machines as plain values, the input of planning and rules.

``visible_gpus`` interprets CUDA_VISIBLE_DEVICES like CUDA, for a process that has not started yet.
The variable of the launch may have UUIDs; that of a role must have numbers. CUDA silently ignores
all entries from the first unusable one on, and shows no GPU if one is listed twice. Here both are
problems. Source: tried with the driver of CUDA 13 on two H200s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# Groups of facts that can be unknown
Fact = Literal["cpus", "memory", "gpus", "gpu_memory", "fabric", "cumem", "shm"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Describes one CUDA device. Unknown fields are None."""

    index: int = 0  # Place in CUDA_VISIBLE_DEVICES
    name: str = "GPU"
    memory_bytes: int | None = None
    # True if the device supports virtual memory management (``cuMem*``), so CuMem pools work
    has_virtual_memory: bool | None = None
    # True if the device supports fabric handles for its memory and there is an IMEX channel
    has_fabric_handles: bool | None = None
    # Address on the PCI bus, by which NVML finds the device: ``0000:19:00.0``
    pci_bus_id: str | None = None
    free_memory_bytes: int | None = None  # Memory that no process holds; None for a MIG device

    @property
    def held_bytes(self) -> int:
        if self.memory_bytes is None or self.free_memory_bytes is None:
            return 0
        return max(0, self.memory_bytes - self.free_memory_bytes)

    @property
    def is_slice(self) -> bool:
        """Return True for a MIG device, a part of a GPU that cannot access other GPUs' memory."""
        return "MIG" in self.name.split()


@dataclass(frozen=True, slots=True)
class Machine:
    """Describes this machine, or an assumed machine of a profile."""

    system: str = "Linux"
    num_cpus: int = 1  # cores that a process may use
    # True if the CPU has bfloat16 instructions; emulation is several times slower
    has_native_bf16: bool = False
    memory_bytes: int = 0  # memory of the machine or of its control group, whichever is less
    gpus: tuple[Gpu, ...] = ()
    # True if NVIDIA GPUs are on the PCI bus, but this process sees none: CUDA_VISIBLE_DEVICES hides
    # them, or the container does not have them
    has_hidden_gpus: bool = False
    driver_error: str = "no CUDA device is visible"  # the reason why there are no GPUs
    shm_bytes: int = 0  # size of /dev/shm
    shm_free_bytes: int = 0
    rdma_devices: tuple[str, ...] = ()
    # Fact -> the reason why it is unknown
    unknown: Mapping[Fact, str] = field(default_factory=dict)

    @property
    def cumem_problem(self) -> str:
        """Return why CuMem pools do not work on this machine; empty if they do."""
        if self.system != "Linux":
            return f"CuMem pools need Linux; this is {self.system}"
        if not self.gpus:
            return self.driver_error
        without = [str(gpu.index) for gpu in self.gpus if not gpu.has_virtual_memory]
        devices = ", ".join(without)
        return f"no virtual memory management on device {devices}" if without else ""


VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """Holds the GPUs that a process sees; the first is its ``cuda:0``."""

    gpus: tuple[Gpu, ...]
    problem: str = ""  # the mistake in the variable; empty if there is none


def visible_gpus(gpus: Sequence[Gpu], outer: str | None, own: str | None) -> VisibleGpus:
    """Return the GPUs that a process with the variable ``own`` sees.

    ``gpus``: those that the launch sees with its variable ``outer``. Numbers in ``own`` are numbers
    of the machine's GPUs, not places in ``outer``.
    """
    if own is None or own == outer:
        return VisibleGpus(tuple(gpus))
    wanted = _numbers(own)
    if wanted is None:
        return VisibleGpus((), f"{own[:80]!a} is not a list of GPU numbers, such as 0,1")
    if len(set(wanted)) < len(wanted):
        return VisibleGpus((), "it names a GPU twice; CUDA then shows no GPU at all")
    listed = [] if outer is None else _numbers(outer)
    if listed is None:
        reason = f"as the launch's own {VISIBLE_DEVICES} has UUIDs"
        return VisibleGpus((), f"the numbers of its GPUs are not known, {reason}")
    # If the machine is a profile, the variable of this shell does not describe its GPUs.
    known = listed if len(listed) == len(gpus) else range(len(gpus))
    by_number = dict(zip(known, gpus, strict=True))
    missing = next((number for number in wanted if number not in by_number), None)
    if missing is not None:
        there = ", ".join(map(str, by_number)) or "none"
        return VisibleGpus((), f"there is no GPU {missing} for this launch, which sees {there}")
    # Keep the order of the variable: its first entry is cuda:0 of the process.
    return VisibleGpus(tuple(by_number[number] for number in wanted))


def _numbers(value: str) -> list[int] | None:
    """Return the numbers before the first -1 or empty entry; None if an entry is not a number."""
    numbers: list[int] = []
    for entry in map(str.strip, value.split(",")):
        if entry in ("", "-1"):
            break
        if not (entry.isascii() and entry.isdecimal()):
            return None
        numbers.append(int(entry))
    return numbers
