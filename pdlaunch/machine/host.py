"""Reads cores, memory and shared memory of this host, which packages it lacks, and what the kernel
and torch's allocator settings say.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Variables in the order in which torch prefers them
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_MEANT_AS_TRUE = ("true", "1", "yes", "on")
RDMA_FOLDER = Path("/sys/class/infiniband")
SHM_FOLDER = Path("/dev/shm")

SLACK_NS = 1000
_PR_SET_TIMERSLACK = 29
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_RECORDED = frozenset(
    {*ALLOCATOR_VARIABLES, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "GLOO_SOCKET_IFNAME"}
)
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
    """Return the variables that rules read: of networks, CUDA's devices and torch's allocator."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _RECORDED or name.startswith(("UCX_", "NCCL_"))
    }


def host_identity(proc: Path = Path("/proc")) -> str:
    """Return a text that is equal in two processes that reach each other's abstract Unix sockets.

    It names the kernel and its network namespace; empty where the kernel does not tell.
    """
    try:
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{(proc / 'self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def sleep_precisely() -> None:
    """Let short sleeps of the calling thread end on time, and not up to 50 us later.

    No harm is done where the kernel refuses. Source: prctl(2), PR_SET_TIMERSLACK.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


def expandable_segments_variable(environ: Mapping[str, str]) -> str | None:
    """Return the variable by which a process with this environment gets expandable segments, or is
    meant to (``true`` and ``1``, which torch refuses); None: it gets none.

    torch 2.11 to 2.13 takes its keys from the first of the variables that is set, be it empty; a
    comment in torch's header states the opposite order. White space does not count, and the last of
    repeated keys wins.
    """
    name = next((name for name in ALLOCATOR_VARIABLES if name in environ), None)
    text = "" if name is None else re.sub(r"\s", "", environ[name])
    values = re.findall(r"(?:^|,)expandable_segments:([^,:\[\]]*)", text)
    return name if values and values[-1].lower() in _MEANT_AS_TRUE else None
