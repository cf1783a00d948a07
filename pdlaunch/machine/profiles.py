"""Profiles of machines by name, for checks on a laptop: ``h100x8``, ``gb200``, ``cpu``.

A profile describes only hardware. Software, limits and the present use of GPUs are unknown, and
rules that need such facts are listed as not checked.

Sources: GPU memory of an H200 measured through its driver; of other GPUs in MiB as nvidia-smi shows
it, which is 0.4 % more on an H200. Cores, memory and network devices: user guides of DGX A100, H100
and H200, data sheet of GB200 NVL72.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Fact, Gpu, Machine

MOST_GPUS = 1024
MIB = 1024**2
TB = 10**12
ANY_CUDA = "cuda"  # A machine with unknown GPUs, of which only the number is given
# Names for messages; other numbers such as ``h100x2`` work too
PROFILES = ("h100x8", "h200x8", "gb200", "a100x8", "l40s", ANY_CUDA, "cpu")

_COUNTED = re.compile(r"([a-z0-9]+?)x(\d{1,4})", re.ASCII)
_OF_NO_NAME: tuple[Fact, ...] = ("shm",)
# Facts that differ between servers with the same card
_OF_SERVERS: tuple[Fact, ...] = ("cpus", "memory")
_OF_GPUS: tuple[Fact, ...] = ("gpu_memory", "fabric", "cumem")


@dataclass(frozen=True, slots=True)
class AssumedMachine:
    name: str
    machine: Machine
    about: str  # a description of the machine and of the assumptions, for messages


@dataclass(frozen=True, slots=True)
class _Server:
    about: str
    gpu: Gpu
    machine: Machine  # the server without its GPUs
    num_gpus: int = 8  # GPUs of a profile's name without a number: those of the whole server


def _card(name: str, memory_mib: int, *, has_fabric_handles: bool = False) -> Gpu:
    return Gpu(0, name, memory_mib * MIB, True, has_fabric_handles)


def _machine(cpus: int, memory_bytes: int, num_nics: int, *, bf16: bool = True) -> Machine:
    nics = tuple(f"mlx5_{index}" for index in range(num_nics))
    return Machine("Linux", cpus, bf16, memory_bytes, rdma_devices=nics)


# fmt: off
_SERVERS: Mapping[str, _Server] = {
    "a100": _Server(
        "A100 SXM4 80 GB in a DGX A100", _card("NVIDIA A100-SXM4-80GB", 81920),
        _machine(128, 2 * TB, 8, bf16=False)),
    "h100": _Server(
        "H100 SXM5 80 GB in a DGX H100", _card("NVIDIA H100 80GB HBM3", 81559),
        _machine(112, 2 * TB, 8)),
    "h200": _Server(
        "H200 SXM5 141 GB in a DGX H200", _card("NVIDIA H200", 143156),
        _machine(112, 2 * TB, 8)),
    "gb200": _Server(
        "GB200 in a compute tray of a GB200 NVL72",
        _card("NVIDIA GB200", 189471, has_fabric_handles=True),
        _machine(144, 960 * 10**9, 4), num_gpus=4),
    # Servers with this card differ in everything else.
    "l40s": _Server(
        "L40S 48 GB at PCIe 4.0 x16", _card("NVIDIA L40S", 46068),
        Machine(unknown=dict.fromkeys(_OF_SERVERS, ""))),
}
# fmt: on


def find_machine(name: str, num_ranks: int, field: str) -> AssumedMachine:
    """Return a profile's machine; ``cuda`` alone has ``num_ranks`` GPUs. Raises ConfigError."""
    match = _COUNTED.fullmatch(name.lower())
    kind, number = (match[1], int(match[2])) if match else (name.lower(), None)
    server = _SERVERS.get(kind)
    if (number is not None and not 1 <= number <= MOST_GPUS) or (
        server is None and kind != ANY_CUDA and (kind, number) != ("cpu", None)
    ):
        raise ConfigError(
            f"{name[:80]!a} is not one of {', '.join(PROFILES)}",
            field=field,
            value=name,
            fix="name the profile of a similar machine; h100x2 stands for two H100s",
        )
    machine, gpu, unknown = Machine(), Gpu(), [*_OF_NO_NAME, *_OF_SERVERS]
    if server is not None:
        count, machine, gpu = number or server.num_gpus, server.machine, server.gpu
        unknown = [*_OF_NO_NAME, *machine.unknown]
        imex = "an IMEX channel, so" if gpu.has_fabric_handles else "no IMEX channel, so no"
        granted = f"a driver with CuMem pools; {imex} fabric handles; no other process on the GPUs"
        about = f"{count} x {server.about}; taken for granted: {granted}"
    elif kind == ANY_CUDA:
        count = number or min(max(num_ranks, 1), MOST_GPUS)
        unknown += _OF_GPUS
        about = f"{count} CUDA GPU{'' if count == 1 else 's'} of an unknown kind"
    else:
        count, about = 0, "a Linux machine without GPUs"
    gpus = tuple(replace(gpu, index=index) for index in range(count))
    told = dict.fromkeys(unknown, f"profile {name} does not say")
    return AssumedMachine(name, replace(machine, gpus=gpus, unknown=told), about)
