"""Probes every fact about this machine in well under a second; names what cannot be found out."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pdlaunch.platform.cuda_driver import Driver, DriverError, judge_cumem, probe_cumem, read_driver
from pdlaunch.platform.facts import UNLIMITED, Fact, Gpu, Libraries, Limits, Machine, SharedMemory
from pdlaunch.platform.libraries import find_libraries
from pdlaunch.platform.limits import (
    has_native_bf16,
    memory_bytes,
    read_limits,
    read_shared_memory,
    usable_cpus,
)

T = TypeVar("T")

RDMA_FOLDER = Path("/sys/class/infiniband")


def probe_machine() -> Machine:
    """Return what this machine is; never raises."""
    probes = _Probes()
    driver = probes.ask("gpus", _read_driver, None)
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cpus=usable_cpus(),
        has_native_bf16=has_native_bf16(),
        memory_bytes=probes.ask("memory", memory_bytes, 0),
        gpus=driver.gpus if driver else (),
        driver_cuda=driver.cuda_version if driver else None,
        cumem=judge_cumem(driver) if driver else probe_cumem(),
        libraries=probes.ask("libraries", find_libraries, Libraries()),
        limits=probes.ask("limits", read_limits, Limits(UNLIMITED, UNLIMITED)),
        shm=probes.ask("shm", read_shared_memory, SharedMemory(0, 0)),
        rdma_devices=probes.ask("rdma", _rdma_devices, ()),
        unknown=probes.unknown,
    )


def assume(machine: Machine, *, num_gpus: int, gpu_memory_bytes: int | None) -> Machine:
    """Return ``machine`` as it would be with this many equal GPUs; without any it has no CUDA.

    Everything that only a probe on the real machine can tell is unknown.
    """
    reason = "the platform is assumed"
    unknown: dict[Fact, str] = dict.fromkeys(
        ("limits", "shm", "libraries", "rdma", "memory"), reason
    )
    if num_gpus:
        unknown["cumem"] = reason
    if num_gpus and gpu_memory_bytes is None:
        unknown["gpu_memory"] = "the memory of the assumed GPUs is not given (--assume-gpu-memory)"
    return replace(
        machine,
        system="Linux",
        gpus=tuple(Gpu(index, "assumed GPU", gpu_memory_bytes) for index in range(num_gpus)),
        driver_cuda=None,
        cumem=replace(
            machine.cumem,
            available=bool(num_gpus),
            reason="--assume-platform cpu" if not num_gpus else reason,
        ),
        unknown=unknown,
    )


class _Probes:
    """Asks probes, and keeps the reasons of those that cannot answer."""

    def __init__(self) -> None:
        self.unknown: dict[Fact, str] = {}

    def ask(self, fact: Fact, probe: Callable[[], T], otherwise: T) -> T:
        try:
            return probe()
        except (
            Exception
        ) as error:  # Whatever a machine does to a probe: the fact is unknown, nothing else fails.
            self.unknown[fact] = f"{type(error).__name__}: {error}"
            return otherwise


def _read_driver() -> Driver | None:
    """Return None where there is no CUDA device, which is a fact and not a failed probe."""
    try:
        return read_driver()
    except DriverError:
        return None


def _rdma_devices() -> tuple[str, ...]:
    return (
        tuple(sorted(path.name for path in RDMA_FOLDER.iterdir())) if RDMA_FOLDER.is_dir() else ()
    )
