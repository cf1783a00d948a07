"""Reads cores, memory and shared memory of this host, and which packages it lacks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from pdlaunch.machine.allocator_conf import VARIABLES

RDMA_FOLDER = Path("/sys/class/infiniband")
SHM_FOLDER = Path("/dev/shm")

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_RECORDED = frozenset({*VARIABLES, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def first_line(path: Path) -> str:
    """Return the line; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def usable_cpus() -> tuple[int, ...]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU multiplies bfloat16 itself (x86: AVX-512 BF16, AMX; ARM: BF16)."""
    try:
        # One core speaks for all: no server mixes cores with and without.
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            flags = next(
                (line for line in file if line.lower().startswith(("flags", "features"))), ""
            )
    except OSError:
        return False
    return not _BF16_FLAGS.isdisjoint(flags.split())


def memory_bytes() -> int:
    """Return the memory of the machine, or of the control group where that is less.

    Raises OSError or ValueError where it is not known.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Version 2 writes "max" where there is no limit; of version 1 the number exceeds any memory.
    limits = [first_line(path) for path in _CGROUP_LIMITS]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def shared_memory(folder: Path = SHM_FOLDER) -> tuple[int, int]:
    """Return all bytes of /dev/shm and the free ones. Raises OSError where there is none."""
    stats = os.statvfs(folder)
    return stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail


def missing_modules(extras: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return by extra the first of its modules that is not found; none of them is imported."""
    missing: dict[str, str] = {}
    for extra, modules in extras.items():
        for module in modules:
            try:
                is_found = importlib.util.find_spec(module) is not None
            except (ImportError, ValueError, AttributeError):
                is_found = False
            if not is_found:
                missing.setdefault(extra, module)
    return missing


def recorded_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that rules read: of UCX, of CUDA's devices and of torch's allocator."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _RECORDED or name.startswith("UCX_")
    }
