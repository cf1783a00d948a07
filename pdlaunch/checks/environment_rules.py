"""PD40x and PD41x: packages, devices and limits of this machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.sizes import format_size, parse_size
from pdlaunch.platform.facts import UNLIMITED, Libraries

MIN_SHM_BYTES = parse_size("256MiB")
OLDEST_MOONCAKE = (0, 3, 13)
_FILES_OF_A_PROCESS = 64
_FILES_OF_A_PAIR = 4


@rule(
    "PD400",
    "error",
    fix="Run serve on Linux, in a container or a virtual machine.",
    source="Supported platforms.",
)
def not_linux(context: Context) -> Iterator[Found]:
    """This system is not Linux.

    Processes, shared memory and devices are handled the Linux way; check-config works everywhere.
    """
    if context.machine.system != "Linux":
        yield Found("system", f"serve needs Linux, this is {context.machine.system}")


@rule(
    "PD401",
    "error",
    fix="pip install pdlaunch, without --no-deps.",
    source="The dependencies of pdlaunch.",
    needs=("libraries",),
)
def packages_missing(context: Context) -> Iterator[Found]:
    """torch or transformers is not installed.

    The ranks compute with them.
    """
    for name, version in (
        ("torch", context.machine.libraries.torch),
        ("transformers", context.machine.libraries.transformers),
    ):
        if version is None:
            yield Found(f"package {name}", f"{name} is not installed for this Python")


@rule(
    "PD402",
    "error",
    fix="pip install nixl",
    source="The dependencies of the nixl connector.",
    needs=("libraries",),
)
def nixl_missing(context: Context) -> Iterator[Found]:
    """NIXL is not installed.

    The nixl connector moves every KV block with it.
    """
    nixl = context.machine.libraries.nixl
    if not _uses(context, "nixl"):
        return
    if nixl.version is None:
        yield Found("package nixl", "nixl is not installed for this Python")
    elif not nixl.backends:
        yield Found(
            "package nixl",
            f"nixl {nixl.version} has no build beside it",
            "pip install nixl-cu12, or nixl-cu13",
        )


@rule(
    "PD403",
    "error",
    fix="Install nixl again, or correct NIXL_PLUGIN_DIR.",
    source="NIXL 1.5.1: libplugin_UCX.so.",
    needs=("libraries",),
)
def ucx_plugin_missing(context: Context) -> Iterator[Found]:
    """The UCX plugin of NIXL is not there.

    NIXL loads its backends from plugin files beside it, or from NIXL_PLUGIN_DIR. Without UCX no
    agent can be made.
    """
    build = _nixl_build(context.machine.libraries)
    if (
        _uses(context, "nixl")
        and build is not None
        and build not in context.machine.libraries.nixl.backends_with_ucx
    ):
        yield Found(f"package nixl-{build}", f"libplugin_UCX.so of nixl-{build} is not found")


@rule(
    "PD404",
    "error",
    fix=(
        "Read the error; often a CUDA library of another generation stands first in "
        "LD_LIBRARY_PATH."
    ),
    source="The import, tried in a process of its own.",
    needs=("imports",),
)
def import_fails(context: Context) -> Iterator[Found]:
    """NIXL cannot be imported.

    A shared library that it needs is missing or of another version; every rank would end with this
    error.
    """
    for module, error in (context.probes.import_errors or {}).items():
        if module != "nixl" or _uses(context, "nixl"):
            yield Found(f"package {module}", f"import of {module} fails: {error}")


@rule(
    "PD405",
    "error",
    fix="Install the nixl build of torch's CUDA generation.",
    source="nixl 1.5.1: the meta package asks torch for its CUDA version.",
    needs=("libraries",),
)
def cuda_generations_mixed(context: Context) -> Iterator[Found]:
    """torch and NIXL are built for different CUDA generations.

    NIXL loads the build for torch's CUDA generation; with another one, two CUDA runtimes of
    different generations meet in one process, and the import fails or copies end in errors.
    """
    libraries = context.machine.libraries
    if libraries.torch_cuda is None or not libraries.nixl.backends or not _uses(context, "nixl"):
        return
    wanted = f"cu{libraries.torch_cuda.partition('.')[0]}"
    if wanted not in libraries.nixl.backends:
        there = ", ".join(f"nixl-{name}" for name in sorted(libraries.nixl.backends))
        message = (
            f"torch {libraries.torch} is built for CUDA {libraries.torch_cuda}, NIXL is there as "
            f"{there}"
        )
        yield Found("package nixl", message, f"pip install nixl-{wanted}")


@rule(
    "PD406",
    "error",
    fix="Install a CUDA build of torch, or set device: cpu.",
    source="torch/version.py.",
    needs=("libraries", "gpus"),
)
def torch_without_cuda(context: Context) -> Iterator[Found]:
    """torch is built without CUDA, and engines are to run on GPUs.

    A CPU build of torch does not see any GPU.
    """
    libraries = context.machine.libraries
    for engine in context.on("cuda"):
        if libraries.torch is not None and libraries.torch_cuda is None and context.machine.gpus:
            yield Found(engine.where("device"), f"torch {libraries.torch} is built without CUDA")


@rule(
    "PD407",
    "error",
    fix="Update the driver, or install a torch build for an older CUDA.",
    source="CUDA compatibility: minor versions of one generation fit, later generations do not.",
    needs=("libraries", "gpus"),
)
def driver_too_old(context: Context) -> Iterator[Found]:
    """The CUDA driver is too old for torch.

    A driver runs programs of its own CUDA generation and older ones.
    """
    driver, built = context.machine.driver_cuda, context.machine.libraries.torch_cuda
    if driver is None or built is None or not any(True for _ in context.on("cuda")):
        return
    if int(built.partition(".")[0]) > driver[0]:
        message = (
            f"torch is built for CUDA {built}, the driver runs up to CUDA {driver[0]}.{driver[1]}"
        )
        yield Found("CUDA driver", message)


@rule(
    "PD408",
    "error",
    fix="On Debian and Ubuntu: apt-get install libibverbs1",
    source=(
        "mooncake-transfer-engine: works over tcp on a CPU once libibverbs1 is there (measured)."
    ),
    needs=("libraries",),
)
def mooncake_libraries(context: Context) -> Iterator[Found]:
    """A library that Mooncake needs is missing.

    The transfer engine is linked against it, whatever protocol is used: its import fails.
    """
    libraries = context.machine.libraries
    if not _uses(context, "mooncake"):
        return
    if not libraries.mooncake:
        yield Found(
            "package mooncake",
            "mooncake is not installed for this Python",
            "pip install mooncake-transfer-engine",
        )
    elif (
        libraries.mooncake_version is not None
        and _numbers(libraries.mooncake_version) < OLDEST_MOONCAKE
    ):
        oldest = ".".join(map(str, OLDEST_MOONCAKE))
        yield Found(
            "package mooncake",
            (
                f"mooncake is {libraries.mooncake_version}; {oldest} is the oldest whose writes "
                "over TCP are acknowledged"
            ),
            f"pip install 'mooncake-transfer-engine>={oldest}'",
        )
    for name in libraries.missing_for_mooncake:
        yield Found("package mooncake", f"the loader does not find {name}")


@rule(
    "PD409",
    "warning",
    fix=(
        "Use connector nixl, which listens nowhere, or give the deployment a network namespace of "
        "its own."
    ),
    source="Listening sockets of Mooncake 0.3.13 (measured); SO_BINDTODEVICE in socket(7).",
)
def mooncake_sockets(context: Context) -> Iterator[Found]:
    """Mooncake's sockets admit every process of this machine.

    Each rank listens on two ports without authentication. pdlaunch binds them to the loopback
    device, so that no other host reaches them; a process of this machine could still read and write
    KV blocks.
    """
    if _uses(context, "mooncake"):
        yield Found(
            "kv_transfer.connector",
            "mooncake listens without authentication on this machine's loopback device",
        )


@rule(
    "PD425",
    "warning",
    fix="Use one rank an engine, or give the deployment a network namespace of its own.",
    source="Listening sockets of torch 2.13's gloo (measured).",
)
def gloo_sockets(context: Context) -> Iterator[Found]:
    """Gloo's sockets admit every process of this machine.

    The ranks of a tensor parallel group on a CPU exchange activations over TCP. Each listens on a
    port of the loopback device without authentication: a process of this machine that is there
    while a group is formed could take a rank's place.
    """
    for engine in context.on("cpu"):
        if engine.tp_size > 1:
            place = f"{engine.role}.tensor_parallel_size"
            yield Found(
                place,
                (
                    f"each of {engine.tp_size} ranks listens without authentication on this "
                    "machine's loopback device"
                ),
            )


@rule(
    "PD410",
    "error",
    fix=(
        "Set device: cpu, or check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU option."
    ),
    source="cuInit and cuDeviceGetCount.",
    needs=("gpus",),
)
def no_gpu(context: Context) -> Iterator[Found]:
    """Engines are to run on GPUs, but there is none.

    The driver shows no CUDA device to this process.
    """
    for engine in context.on("cuda"):
        if not context.machine.gpus:
            yield Found(
                engine.where("device"),
                f"device is cuda, but no CUDA device is visible: {context.machine.cumem.reason}",
            )


@rule(
    "PD411",
    "error",
    fix="Lower tensor_parallel_size.",
    source="NCCL: one rank a device.",
    needs=("gpus",),
)
def too_few_gpus(context: Context) -> Iterator[Found]:
    """There are fewer GPUs than one engine has ranks.

    Two ranks of one engine on a device would wait for each other in collective operations that need
    a device each.
    """
    there = len(context.machine.gpus)
    for engine in context.on("cuda"):
        if there and engine.tp_size > there:
            message = (
                f"a {engine.role} engine has {engine.tp_size} ranks, this machine {there} GPUs"
            )
            yield Found(
                f"{engine.role}.tensor_parallel_size", message, f"set it to {there} or less"
            )


@rule(
    "PD412",
    "warning",
    fix="Use fewer engines, or more cores.",
    source="Measured on 2 cores.",
)
def too_few_cores(context: Context) -> Iterator[Found]:
    """There are fewer CPU cores than ranks.

    Ranks then take turns on a core: prefill and decode do not overlap.
    """
    ranks, cores = sum(engine.num_ranks for engine in context.on("cpu")), len(context.machine.cpus)
    if ranks > cores:
        yield Found("prefill.replicas", f"{ranks} ranks compute on {cores} cores")


@rule(
    "PD413",
    "warning",
    fix="Set dtype: auto or float32.",
    source=(
        "SmolLM2-135M on an AVX2 machine: 2.8 s for 128 tokens in bfloat16, 0.4 s in float32 "
        "(measured)."
    ),
)
def emulated_dtype(context: Context) -> Iterator[Found]:
    """A 16-bit dtype is computed on a CPU that emulates it.

    Prefill takes six times as long as in float32, and greedy answers depend on the shape of the
    batch.
    """
    for engine in context.on("cpu"):
        dtype = engine.settings.dtype
        if dtype == "float16" or (dtype == "bfloat16" and not engine.machine.has_native_bf16):
            yield Found(engine.where("dtype"), f"dtype is {dtype}, which this CPU emulates")


@rule(
    "PD414",
    "warning",
    fix="ulimit -l unlimited; in containers --ulimit memlock=-1.",
    source="ibv_reg_mr, RLIMIT_MEMLOCK.",
    needs=("limits", "rdma", "model"),
)
def memlock_low(context: Context) -> Iterator[Found]:
    """Little memory may be locked, and RDMA needs locked memory.

    Registering the KV cache with an RDMA device locks it. Beyond the limit registration fails, or
    falls back to TCP.
    """
    limit = context.machine.limits.memlock_bytes
    if limit == UNLIMITED or not context.machine.rdma_devices or context.pair() is None:
        return
    for engine in context.engines.values():
        needed = engine.footprint
        if needed is not None and needed.kv_bytes > limit:
            cache = format_size(needed.kv_bytes)
            yield Found(
                "limit memlock",
                f"{format_size(limit)} may be locked, the KV cache of a rank has {cache}",
            )


@rule(
    "PD415",
    "warning",
    fix="ulimit -n 65536; in containers --ulimit nofile=65536.",
    source="RLIMIT_NOFILE.",
    needs=("limits",),
)
def open_files_low(context: Context) -> Iterator[Found]:
    """Few files may be open.

    Every request, pair of ranks and shared-memory segment takes descriptors. Processes raise their
    soft limit to the hard one, which is what counts. A router that has fewer than it needs serves
    fewer requests at a time.
    """
    limit = context.machine.limits.num_open_files
    ranks = [engine.num_ranks for engine in context.engines.values()]
    needed = (
        _FILES_OF_A_PROCESS
        + 4 * context.config.limits.max_queued_requests
        + _FILES_OF_A_PAIR * math.prod(ranks)
    )
    if limit not in (UNLIMITED, 0) and limit < needed:
        yield Found(
            "limit nofile", f"{limit} files may be open, a process of this set-up can need {needed}"
        )


@rule(
    "PD416",
    "warning",
    fix="docker run --shm-size=1g, or --ipc=host.",
    source="UCX posix and sysv transports, NCCL SHM transport.",
    needs=("shm",),
)
def shm_small(context: Context) -> Iterator[Found]:
    """There is little shared memory.

    UCX, torch and NCCL exchange data through /dev/shm; containers give it 64 MB unless told
    otherwise. A full one ends processes with a bus error.
    """
    shm = context.machine.shm
    if (
        shm.free_bytes < MIN_SHM_BYTES
        and sum(engine.num_ranks for engine in context.engines.values()) > 1
    ):
        yield Found(
            "/dev/shm", f"{format_size(shm.free_bytes)} of {format_size(shm.total_bytes)} are free"
        )


@rule(
    "PD417",
    "warning",
    fix="Remove them, if no process in another container uses this folder too.",
    source="/dev/shm and /proc/*/maps.",
    needs=("shm",),
)
def shm_stale(context: Context) -> Iterator[Found]:
    """Dead processes have left files in shared memory.

    They hold memory until they are removed, and are a sign of processes that were killed.
    """
    stale = context.machine.shm.stale_files
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        yield Found("/dev/shm", f"no visible process uses {', '.join(map(ascii, stale[:3]))}{more}")


@rule(
    "PD418",
    "error",
    fix="Use Linux 5.7 or later or give the ranks CAP_NET_RAW, or use connector nixl.",
    source="SO_BINDTODEVICE in socket(7).",
    needs=("limits",),
)
def mooncake_device_binding(context: Context) -> Iterator[Found]:
    """Mooncake's sockets cannot be closed to other hosts.

    It listens on all addresses, and the kernel does not let this user bind sockets to the loopback
    device: the ranks refuse to start.
    """
    if _uses(context, "mooncake") and not context.machine.limits.can_bind_to_device:
        yield Found("kv_transfer.connector", "the sockets of mooncake would be open to every host")


@rule(
    "PD419",
    "error",
    fix=(
        "Name a folder that the user of the launch may write to, or may create "
        "(--kv-file-directory)."
    ),
    source="access(2); the ranks make the folder at their start.",
    needs=("folders",),
)
def folder_not_writable(context: Context) -> Iterator[Found]:
    """The folder of connector file cannot be written to.

    The ranks put their KV blocks there and would refuse to start. This machine is checked; the
    folder belongs on all hosts.
    """
    for where, problem in (context.probes.folder_problems or {}).items():
        yield Found(where, problem)


def _numbers(version: str) -> tuple[int, ...]:
    """``0.3.13.post1`` as (0, 3, 13)."""
    parts = itertools.takewhile(str.isdecimal, version.split("."))
    return tuple(map(int, parts))


def _uses(context: Context, connector: str) -> bool:
    return context.pair() is not None and context.config.kv_transfer.carrier == connector


def _nixl_build(libraries: Libraries) -> str | None:
    """The build that ``import nixl`` will take."""
    if libraries.torch_cuda is not None:
        wanted = f"cu{libraries.torch_cuda.partition('.')[0]}"
        return wanted if wanted in libraries.nixl.backends else None
    return next(
        (name for name in ("cu13", "cu12", "rocm") if name in libraries.nixl.backends), None
    )
