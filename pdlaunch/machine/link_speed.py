"""Says what the link between two engines should give, as far as this machine can tell."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pdlaunch.machine.facts import LinkKind, Machine
from pdlaunch.machine.host import RDMA_FOLDER, first_line

HOST_SHARE = 1 / 64
"""The share of a plain copy's speed that a READ between two processes of a host should reach.

A quiet machine reached 2.0 GB/s beside a plain copy of 33 (16 MiB, which its cache holds), a loaded
one 0.3 to 0.8: less than half of this share cannot be explained by load."""
LINK_SHARES: Mapping[LinkKind, float] = {"NVLink": 0.75, "PCIe": 0.8}
"""The share of a link's speed that a good path reaches.

Between two H200s with 18 NVLinks (478 GB/s) P2P reached 0.71 to 0.82 and NIXL 0.52 to 0.63; over
PCIe 5.0 x16 to the host 0.87 were reached. A GPU's scratch of 128 MiB takes 0.3 ms even at
that speed, of which starting a READ is little."""

NET_FOLDER = Path("/sys/class/net")
_ACTIVE = "4: ACTIVE"
_RATE = re.compile(r"([\d.]+) Gb/sec")


@dataclass(frozen=True, slots=True)
class ExpectedSpeed:
    """Says what a link should give, one way."""

    gigabytes_per_s: float | None  # none: it is not known
    text: str  # the link, in words; the reason where its speed is not known


def within_cpus(copy_gigabytes_per_s: float) -> ExpectedSpeed:
    """Return what two engines in the memory of one host's CPUs should reach."""
    return ExpectedSpeed(
        HOST_SHARE * copy_gigabytes_per_s,
        f"memory of this host, of which a plain copy reaches {copy_gigabytes_per_s:.3g} GB/s",
    )


def between_gpus(machine: Machine) -> ExpectedSpeed:
    """Return what two GPUs of a machine should reach, where it is the same for any two of them.

    Nobody tells on which of them an engine runs.
    """
    gpus = [gpu.index for gpu in machine.gpus]
    if len(gpus) < 2:
        return ExpectedSpeed(None, "this process sees one GPU of this host, which both may share")
    links = {(link.first, link.second): link for link in machine.gpu_links}
    pairs = list(itertools.combinations(gpus, 2))
    speeds = {(links[pair].kind, links[pair].gigabytes_per_s) for pair in pairs if pair in links}
    if len(speeds) > 1 or len(links) < len(pairs):
        return ExpectedSpeed(
            None, f"the links between this host's {len(gpus)} GPUs differ, or NVML tells none"
        )
    ((kind, speed),) = speeds
    return ExpectedSpeed(
        LINK_SHARES[kind] * speed, f"{kind} with {speed:.3g} GB/s between any two GPUs of this host"
    )


def over_network(
    device: str, net_folder: Path = NET_FOLDER, rdma_folder: Path = RDMA_FOLDER
) -> ExpectedSpeed:
    """Return what the wires of this machine carry.

    ``device``: the network device on the route. RDMA goes past it, where the machine has any.
    """
    if rdma := _fastest_rdma_port(rdma_folder):
        name, rate = rdma
        return ExpectedSpeed(rate / 8, f"RDMA port {name} with {rate:g} Gbit/s")
    folder = net_folder / device
    is_real = (folder / "device").exists() or any(folder.glob("lower_*"))
    megabits = _number(folder / "speed")
    if not is_real:
        return ExpectedSpeed(None, f"{device} is a virtual device")
    if megabits <= 0:
        return ExpectedSpeed(None, f"the driver of {device} does not tell its speed")
    return ExpectedSpeed(megabits / 8000, f"{device} with {megabits / 1000:g} Gbit/s")


def _fastest_rdma_port(folder: Path) -> tuple[str, float] | None:
    """Return name and Gbit/s of the active port with the highest rate."""
    rates = {
        f"{port.parents[1].name}/{port.name}": float(found[1])
        for port in folder.glob("*/ports/*")
        if first_line(port / "state") == _ACTIVE
        and (found := _RATE.match(first_line(port / "rate")))
    }
    return max(rates.items(), key=lambda item: item[1], default=None)


def _number(path: Path) -> float:
    try:
        return float(first_line(path))
    except ValueError:
        return -math.inf


_NUM_BYTES = 16 * 1024**2
_NUM_COPIES = 5


def measure_copy_gigabytes_per_s(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the best of a few plain copies of 16 MiB by one thread; takes some milliseconds."""
    buffers = [(ctypes.c_char * _NUM_BYTES).from_buffer(bytearray(_NUM_BYTES)) for _ in range(2)]
    best_s = float("inf")
    for _ in range(_NUM_COPIES):
        start_at = clock()
        ctypes.memmove(buffers[1], buffers[0], _NUM_BYTES)
        # The best and not the mean: another process can only make a copy slower.
        best_s = min(best_s, clock() - start_at)
    return _NUM_BYTES / best_s / 1e9
