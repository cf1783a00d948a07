"""Reads cores, memory, limits and shared memory of this host, and which libraries are installed.

Nothing is imported to look for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pdlaunch.machine.facts import UNLIMITED, Libraries, Limits, NixlInstall, SharedMemory

RDMA_FOLDER = Path("/sys/class/infiniband")
SHM_FOLDER = Path("/dev/shm")
NUMA_FOLDER = Path("/sys/devices/system/node")

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
MOST_CORES = 1 << 16
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_NIXL_BACKENDS = ("cu12", "cu13", "rocm")
_MOONCAKE_LIBRARIES = ("libibverbs.so.1",)
_ASSIGNMENT = r"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"\n]*)['\"]"


def first_line(path: Path) -> str:
    """Return the line; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the cores in order. Raises ValueError for what is no such list."""
    cores: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_CORES:
            raise ValueError(f"{text[:80]!r} is no list of cores such as 0-15,32-47")
        cores.update(range(first, last + 1))
    return tuple(sorted(cores))


def format_cpu_list(cores: Iterable[int]) -> str:
    """Return ``0-3,8``."""
    # Neighbours keep the same distance from their place in the sorted list.
    runs = itertools.groupby(enumerate(sorted(cores)), key=lambda item: item[1] - item[0])
    parts = ([core for _, core in run] for _, run in runs)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in parts)


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
    )


def read_shared_memory(folder: Path = SHM_FOLDER) -> SharedMemory:
    """Read the size of /dev/shm. Raises OSError where there is none."""
    stats = os.statvfs(folder)
    return SharedMemory(stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail)


def find_libraries() -> Libraries:
    """Return what this Python has."""
    torch = _folder("torch")
    version_file = _read(torch / "version.py") if torch else ""
    mooncake = _folder("mooncake")
    return Libraries(
        torch=(_assigned(version_file, "__version__") or "unknown") if torch else None,
        torch_cuda=_assigned(version_file, "cuda"),
        transformers=_version("transformers"),
        nixl=_find_nixl(),
        mooncake=mooncake is not None,
        missing_for_mooncake=tuple(
            name for name in _MOONCAKE_LIBRARIES if mooncake and not _loads(name)
        ),
    )


def missing_modules(extras: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return by extra the first of its modules that is not found; none of them is imported."""
    missing: dict[str, str] = {}
    for extra, modules in extras.items():
        for module in modules:
            if not _is_found(module):
                missing.setdefault(extra, module)
    return missing


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _find_nixl() -> NixlInstall:
    backends = {
        name: version
        for name in _NIXL_BACKENDS
        if (version := _version(f"nixl_{name}")) is not None
    }
    return NixlInstall(_version("nixl"), backends)


def _version(module: str) -> str | None:
    """Read the version from the folder of metadata; ``unknown`` when there is none."""
    folder = _folder(module)
    if folder is None:
        return None
    found = sorted(folder.parent.glob(f"{module}-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else "unknown"


def _folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _assigned(source: str, name: str) -> str | None:
    match = re.search(_ASSIGNMENT.format(name=re.escape(name)), source, re.MULTILINE)
    return match[1] if match else None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
