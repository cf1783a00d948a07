"""Reads cores, memory, resource limits and shared memory of this process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pdlaunch.machine.cpu_lists import parse_cpu_list
from pdlaunch.machine.facts import UNLIMITED, Limits, SharedMemory
from pdlaunch.machine.tcp_sockets import can_bind_to_loopback

SHM_FOLDER = Path("/dev/shm")
NUMA_FOLDER = Path("/sys/devices/system/node")

_STALE_NAMES = re.compile(r"(ucx_shm_posix_|ucx|nccl-|psm_|torch_|sem\.mp-|pdlaunch)")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def usable_cpus() -> tuple[int, ...]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def numa_nodes(folder: Path = NUMA_FOLDER) -> tuple[tuple[int, ...], ...] | None:
    """Return the cores of each NUMA node; None where the kernel does not tell."""
    try:
        nodes = sorted(folder.glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
        return tuple(parse_cpu_list((node / "cpulist").read_text()) for node in nodes) or None
    except (OSError, ValueError):
        return None


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU multiplies bfloat16 itself (x86: AVX-512 BF16, AMX; ARM: BF16)."""
    try:
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
    return min([total, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            yield int(text)


def read_limits() -> Limits:
    """Read the limits. Raises ImportError on systems without them."""
    import resource

    def known(limit: int) -> int:
        return UNLIMITED if limit == resource.RLIM_INFINITY else limit

    return Limits(
        memlock_bytes=known(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        num_open_files=known(
            resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        ),  # to which processes raise the soft one
        can_bind_to_device=can_bind_to_loopback(),
    )


def read_shared_memory(folder: Path = SHM_FOLDER) -> SharedMemory:
    """Read the size of /dev/shm and what dead processes left there.

    Raises OSError where there is none.
    """
    stats = os.statvfs(folder)
    candidates = [path for path in folder.iterdir() if _STALE_NAMES.match(path.name)]
    used = _mapped_files(folder) if candidates else frozenset[str]()
    stale = tuple(
        sorted(path.name for path in candidates if str(path) not in used and _is_ours(path))
    )
    return SharedMemory(stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail, stale)


def _is_ours(path: Path) -> bool:
    """Return whether the file is this user's, who can see its use and may remove it."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _mapped_files(folder: Path) -> frozenset[str]:
    """Return the files of the folder that some visible process has mapped or open."""
    used = (
        path
        for process in Path("/proc").glob("[0-9]*")
        for path in (*_mapped(process), *_open(process))
    )
    return frozenset(path for path in used if path.startswith(str(folder)))


def _mapped(process: Path) -> list[str]:
    with contextlib.suppress(OSError):
        lines = (process / "maps").read_text(errors="replace").splitlines()
        # address, permissions, offset, device, inode, path
        return [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6]
    return []


def _open(process: Path) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for entry in (process / "fd").iterdir():
            # Descriptors come and go while they are listed.
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry))  # noqa: PTH115 - the text, not a Path
    return found
