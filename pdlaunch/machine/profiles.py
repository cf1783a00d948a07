"""Knows machines by name, for checks on a laptop: ``h100x8``, ``gb200``, ``cpu``.

A name tells the hardware. What is installed there, what its limits are and what runs on its GPUs
is not known of a name, and rules that need it are listed as not checked.

Sources: GPU memory of an H200 as its driver says, measured; of the others in MiB as nvidia-smi
shows it, which is 0.4 % more on an H200; links from the data sheets of the GPUs, of which half goes
each way; cores, memory and network devices from the user guides of DGX A100, H100 and H200 and the
data sheet of GB200 NVL72.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Fact, Gpu, GpuLink, LinkKind, Machine, unknown_of_gpus
from pdlaunch.machine.machine_file import MOST_GPUS, AssumedMachine, read_machine_file

MIB = 1024**2
TB = 10**12
ANY_CUDA = "cuda"  # GPUs of which nothing but their number is known
PROFILES = ("h100x8", "h200x8", "gb200", "a100x8", "l40s", ANY_CUDA, "cpu")
"""Names to show; ``h100x2`` and the like are known too."""

_COUNTED = re.compile(r"([a-z0-9]+?)x(\d{1,4})", re.ASCII)
_OF_NO_NAME: tuple[Fact, ...] = ("libraries", "limits", "shm")
_OF_SERVERS: tuple[Fact, ...] = ("cpus", "native_bf16", "memory", "rdma")
"""Facts that differ between servers with the same card."""


def _server(
    name: str,
    gpu: str,
    memory_mib: int,
    link_gigabytes_per_s: float,
    link: LinkKind = "NVLink",
    num_gpus: int = 8,
    num_rdma_devices: int = 8,
    has_imex_channel: bool = False,
    machine: Machine | None = None,
) -> AssumedMachine:
    """Return a server with all its GPUs; None for ``machine``: nothing is known but the card."""
    card = Gpu(0, gpu, memory_mib * MIB, True, has_imex_channel)
    base = machine or Machine(unknown=dict.fromkeys(_OF_SERVERS, ""))
    imex = "an" if has_imex_channel else "no"
    about = (
        f"{name}; taken for granted: driver 580 with CUDA 13.0; {imex} IMEX channel, so "
        f"{'' if has_imex_channel else 'no '}fabric handles; no other process on the GPUs"
    )
    known = replace(
        base,
        gpus=tuple(replace(card, index=index) for index in range(num_gpus)),
        gpu_links=tuple(
            GpuLink(first, second, link, link_gigabytes_per_s)
            for first, second in itertools.combinations(range(num_gpus), 2)
        ),
        driver_cuda=(13, 0),
        rdma_devices=tuple(f"mlx5_{index}" for index in range(num_rdma_devices if machine else 0)),
    )
    return AssumedMachine(name, known, {}, about)


def _machine(num_cpus: int, memory_bytes: int, *, has_native_bf16: bool) -> Machine:
    return Machine(num_cpus=num_cpus, memory_bytes=memory_bytes, has_native_bf16=has_native_bf16)


# fmt: off
_SERVERS: Mapping[str, AssumedMachine] = {
    "a100": _server(
        "A100 SXM4 80 GB in a DGX A100", "NVIDIA A100-SXM4-80GB", 81920, 300,
        machine=_machine(128, 2 * TB, has_native_bf16=False)),
    "h100": _server(
        "H100 SXM5 80 GB in a DGX H100", "NVIDIA H100 80GB HBM3", 81559, 450,
        machine=_machine(112, 2 * TB, has_native_bf16=True)),
    "h200": _server(
        "H200 SXM5 141 GB in a DGX H200", "NVIDIA H200", 143156, 450,
        machine=_machine(112, 2 * TB, has_native_bf16=True)),
    "gb200": _server(
        "GB200 in a compute tray of a GB200 NVL72", "NVIDIA GB200", 189471, 900,
        num_gpus=4, num_rdma_devices=4, has_imex_channel=True,
        machine=_machine(144, 960 * 10**9, has_native_bf16=True)),
    "l40s": _server("L40S 48 GB at PCIe 4.0 x16", "NVIDIA L40S", 46068, 31.5, "PCIe"),
}
# fmt: on


def find_machine(name: str, num_ranks: int, field: str) -> AssumedMachine:
    """Return the machine of a profile or a file; ``field`` gives its name. Raises ConfigError."""
    if (found := find_profile(name, num_ranks)) is not None:
        return found
    path = Path(name).expanduser()
    if path.exists():
        return read_machine_file(path)
    raise ConfigError(
        f"{name[:80]!a} is neither a file nor one of {', '.join(PROFILES)}",
        field=field,
        value=name,
        fix="run `pdlaunch probe > machine.json` on the machine, and name that file",
    )


def find_profile(name: str, num_ranks: int) -> AssumedMachine | None:
    """Return the machine of this name; None: there is no such name.

    ``cuda`` without a number has a GPU for each of ``num_ranks``.
    """
    match = _COUNTED.fullmatch(name.lower())
    kind, number = (match[1], int(match[2])) if match else (name.lower(), None)
    if number is not None and not 1 <= number <= MOST_GPUS:
        return None
    if kind == "cpu" and number is None:
        return _named(name, Machine(), (*_OF_NO_NAME, *_OF_SERVERS), "a Linux machine without GPUs")
    if kind == ANY_CUDA:
        count = number or min(max(num_ranks, 1), MOST_GPUS)
        gpus = tuple(Gpu(index) for index in range(count))
        unknown: tuple[Fact, ...] = (*_OF_NO_NAME, *_OF_SERVERS, "driver", *unknown_of_gpus(gpus))
        about = f"{count} CUDA GPU{'' if count == 1 else 's'} of an unknown kind"
        return _named(name, Machine(gpus=gpus), unknown, about)
    server = _SERVERS.get(kind)
    if server is None:
        return None
    whole = server.machine
    count = number or len(whole.gpus)
    machine = replace(
        whole,
        gpus=tuple(replace(whole.gpus[0], index=index) for index in range(count)),
        # No server has more GPUs at one switch.
        gpu_links=tuple(link for link in whole.gpu_links if link.second < count)
        if count <= len(whole.gpus)
        else (),
    )
    unknown = (*_OF_NO_NAME, *whole.unknown)
    return _named(name, machine, unknown, f"{count} x {server.about}")


def _named(name: str, machine: Machine, unknown: tuple[Fact, ...], about: str) -> AssumedMachine:
    told = dict.fromkeys(unknown, f"profile {name} does not say")
    return AssumedMachine(name, replace(machine, unknown=told), {}, about)
