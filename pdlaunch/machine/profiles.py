"""Knows machines by name, for checks on a laptop: ``h100x8``, ``gb200``, ``cpu``.

A name tells the hardware. What is installed there, what its limits are and what runs on its GPUs
is not known of a name, and rules that need it are listed as not checked.

Sources: GPU memory of an H200 as its driver says, measured; of the others in MiB as nvidia-smi
shows it, which is 0.4 % more on an H200; compute capabilities from NVIDIA's table of CUDA GPUs;
links from the data sheets of the GPUs, of which half goes each way; cores, memory and network
devices from the user guides of DGX A100, H100 and H200 and the data sheet of GB200 NVL72.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdlaunch.machine.cuda_driver import NO_DEVICE
from pdlaunch.machine.facts import Availability, Fact, Gpu, LinkedGpus, LinkKind, Machine
from pdlaunch.machine.machine_file import MOST_GPUS, AssumedMachine, unknown_of_gpus

MIB = 1024**2
TB = 10**12
ANY_CUDA = "cuda"  # GPUs of which nothing but their number is known

_COUNTED = re.compile(r"([a-z0-9]+?)x(\d{1,4})", re.ASCII)
_DRIVER = "driver 580 with CUDA 13.0"
_NO_IMEX = "no IMEX channel, so no fabric handles"
_OF_NO_NAME: tuple[Fact, ...] = ("libraries", "limits", "shm")


@dataclass(frozen=True, slots=True)
class _Server:
    """Describes a server with equal GPUs."""

    gpu: str
    memory_mib: int
    compute_capability: tuple[int, int]
    text: str
    link_gigabytes_per_s: float
    link: LinkKind = "NVLink"
    num_gpus: int = 8  # GPUs of the whole server, which its name without a number stands for
    has_imex_channel: bool = False
    architecture: str = "x86_64"
    num_cores: int | None = None
    has_native_bf16: bool | None = None
    memory_bytes: int | None = None
    num_rdma_devices: int | None = None


_DGX: dict[str, Any] = {"memory_bytes": 2 * TB, "num_rdma_devices": 8}
# fmt: off
_SERVERS: Mapping[str, _Server] = {
    "a100": _Server(
        "NVIDIA A100-SXM4-80GB", 81920, (8, 0), "A100 SXM4 80 GB in a DGX A100", 300,
        num_cores=128, has_native_bf16=False, **_DGX),
    "h100": _Server(
        "NVIDIA H100 80GB HBM3", 81559, (9, 0), "H100 SXM5 80 GB in a DGX H100", 450,
        num_cores=112, has_native_bf16=True, **_DGX),
    "h200": _Server(
        "NVIDIA H200", 143156, (9, 0), "H200 SXM5 141 GB in a DGX H200", 450,
        num_cores=112, has_native_bf16=True, **_DGX),
    "gb200": _Server(
        "NVIDIA GB200", 189471, (10, 0), "GB200 in a compute tray of a GB200 NVL72", 900,
        num_gpus=4, has_imex_channel=True, architecture="aarch64", num_cores=144,
        has_native_bf16=True, memory_bytes=960 * 10**9, num_rdma_devices=4),
    # Servers with this card differ in all but the card.
    "l40s": _Server(
        "NVIDIA L40S", 46068, (8, 9), "L40S 48 GB at PCIe 4.0 x16", 31.5, link="PCIe"),
}
# fmt: on

PROFILES = ("h100x8", "h200x8", "gb200", "a100x8", "l40s", ANY_CUDA, "cpu")
"""Names to show; ``h100x2`` and the like are known too."""


def find_profile(name: str, num_ranks: int) -> AssumedMachine | None:
    """Return the machine of this name; None: there is no such name.

    ``cuda`` without a number has a GPU for each of ``num_ranks``.
    """
    match = _COUNTED.fullmatch(name.lower())
    kind, number = (match[1], int(match[2])) if match else (name.lower(), None)
    if number is not None and not 1 <= number <= MOST_GPUS:
        return None
    if kind == "cpu" and number is None:
        return AssumedMachine(name, _without_gpus(name), {}, "a Linux machine without GPUs")
    if kind == ANY_CUDA:
        return _any_gpus(name, number or min(max(num_ranks, 1), MOST_GPUS))
    server = _SERVERS.get(kind)
    return None if server is None else _server(name, server, number or server.num_gpus)


def _server(name: str, server: _Server, num_gpus: int) -> AssumedMachine:
    fabric = server.has_imex_channel
    reason = _reason(name)
    unknown: dict[Fact, str] = dict.fromkeys(_OF_NO_NAME, reason)
    of_servers: dict[Fact, object] = {
        "cpus": server.num_cores,
        "native_bf16": server.has_native_bf16,
        "memory": server.memory_bytes,
        "rdma": server.num_rdma_devices,
    }
    unknown |= dict.fromkeys((fact for fact, known in of_servers.items() if known is None), reason)
    machine = Machine(
        architecture=server.architecture,
        cpus=tuple(range(server.num_cores or 1)),
        has_native_bf16=bool(server.has_native_bf16),
        memory_bytes=server.memory_bytes or 0,
        gpus=tuple(
            Gpu(
                index,
                server.gpu,
                server.memory_mib * MIB,
                server.compute_capability,
                has_virtual_memory=True,
                has_fabric_handles=fabric,
            )
            for index in range(num_gpus)
        ),
        gpu_links=tuple(
            LinkedGpus(first, second, server.link, server.link_gigabytes_per_s)
            for first, second in itertools.combinations(range(num_gpus), 2)
        )
        # No server has more at one switch.
        if num_gpus <= server.num_gpus
        else (),
        driver_cuda=(13, 0),
        cumem=Availability(True, f"taken for granted: {_DRIVER}"),
        rdma_devices=tuple(f"mlx5_{index}" for index in range(server.num_rdma_devices or 0)),
        unknown=unknown,
    )
    imex = "an IMEX channel, so fabric handles" if fabric else _NO_IMEX
    granted = f"taken for granted: {_DRIVER}; {imex}; no other process on the GPUs"
    return AssumedMachine(name, machine, {}, f"{num_gpus} x {server.text}; {granted}")


def _any_gpus(name: str, num_gpus: int) -> AssumedMachine:
    gpus = tuple(Gpu(index) for index in range(num_gpus))
    unknown: set[Fact] = {*_without_gpus(name).unknown, *unknown_of_gpus(gpus), "cumem", "driver"}
    machine = Machine(gpus=gpus, unknown=dict.fromkeys(unknown, _reason(name)))
    plural = "" if num_gpus == 1 else "s"
    return AssumedMachine(name, machine, {}, f"{num_gpus} CUDA GPU{plural} of an unknown kind")


def _without_gpus(name: str) -> Machine:
    unknown: tuple[Fact, ...] = (*_OF_NO_NAME, "cpus", "native_bf16", "memory", "rdma")
    return Machine(
        cumem=Availability(False, NO_DEVICE), unknown=dict.fromkeys(unknown, _reason(name))
    )


def _reason(name: str) -> str:
    return f"profile {name} does not say"
