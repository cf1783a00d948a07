"""Reads facts about this host: cores, memory, missing packages, variables of torch's allocator,
and executables of vLLM, which are not run.
"""

import ctypes
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

# torch uses the first of these variables that is set
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
    """Return the text of a file with one line; empty if the file cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True for a CPU with bfloat16 instructions (x86: AVX-512 BF16, AMX; ARM: BF16)."""
    try:
        # Read the flags of one core: no server has cores with and cores without them.
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            flags = next(
                (line for line in file if line.lower().startswith(("flags", "features"))), ""
            )
    except OSError:
        return False
    return not _BF16_FLAGS.isdisjoint(flags.split())


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of its control group if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Without a limit, cgroup v2 has "max", and v1 a number that is larger than any memory.
    limits = [first_line(path) for path in _CGROUP_LIMITS]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def shared_memory(folder: Path = SHM_FOLDER) -> tuple[int, int]:
    """Return the total and the free bytes of /dev/shm. Raises OSError if it does not exist."""
    stats = os.statvfs(folder)
    return stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail


def missing_modules(extras: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the first missing module of each extra that lacks modules. Imports no modules."""
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
    """Return the variables that rules read: networks, CUDA devices and torch's allocator."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _RECORDED or name.startswith(("UCX_", "NCCL_"))
    }


def host_identity(proc: Path = Path("/proc")) -> str:
    """Return a text that is equal in processes that can use each other's abstract sockets."""
    try:
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{(proc / 'self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def sleep_precisely() -> None:
    """Make short sleeps of this thread end on time, not up to 50 us late. Source: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


def expandable_segments_variable(environ: Mapping[str, str]) -> str | None:
    """Return the variable that turns on torch's expandable segments, or None.

    Values such as ``true`` and ``1``, which torch refuses, count as on. torch 2.11 to 2.13 reads
    the first variable that is set, even if it is empty; a comment in torch's header states the
    opposite order. White space does not count, and the last of repeated keys wins.
    """
    name = next((name for name in ALLOCATOR_VARIABLES if name in environ), None)
    text = "" if name is None else re.sub(r"\s", "", environ[name])
    values = re.findall(r"(?:^|,)expandable_segments:([^,:\[\]]*)", text)
    return name if values and values[-1].lower() in _MEANT_AS_TRUE else None


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """Describes an engine's executable, as far as that is possible without running it."""

    problem: str = ""  # the reason why the executable cannot be run; empty if it can
    # Version of vLLM in the environment of the script's Python; None: not known
    version: str | None = None


def find_engine_command(command: str, environ: Mapping[str, str]) -> EngineCommand:
    """Find an executable on PATH or by its path, and the version of vLLM that it belongs to."""
    path = shutil.which(command, path=environ.get("PATH", os.defpath))
    if path is None:
        return EngineCommand(problem=_why_not(command))
    site = _site_packages(Path(path))
    if site is None:
        return EngineCommand()
    # Read the version from metadata: importing vLLM takes seconds and needs its GPU libraries.
    version = next((each.version for each in distributions(name="vllm", path=[str(site)])), None)
    return EngineCommand(version=version)


def _why_not(command: str) -> str:
    if os.sep not in command:
        return "it is not on PATH"
    path = Path(command)
    if path.is_dir():
        return "it is a folder"
    return "this user may not execute it" if path.exists() else "there is no such file"


def _site_packages(script: Path) -> Path | None:
    """Return site-packages of the Python in a console script's first line; None if not found."""
    try:
        with script.open("rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError:
        return None
    interpreter = first.removeprefix("#!").strip()
    if not first.startswith("#!/") or " " in interpreter:
        return None
    # Do not resolve links: the python of a virtual environment links to a folder outside of it.
    root = Path(interpreter).parent.parent
    return next((path for path in sorted(root.glob("lib/python3*/site-packages"))), None)
