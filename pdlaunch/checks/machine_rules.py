"""Rules PD400, PD410 to PD417, PD419, PD450 and PD451 judge a system, its devices and limits."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.problems import shown
from pdlaunch.config.sizes import format_size, parse_size
from pdlaunch.config.ucx import RDMA
from pdlaunch.machine.facts import UNLIMITED
from pdlaunch.machine.visible_gpus import VISIBLE_DEVICES

MIN_SHM_BYTES = parse_size("256MiB")
_FILES_OF_A_PROCESS = 64
_FILES_OF_A_PAIR = 4


@rule(
    "PD400",
    "error",
    fix="Run serve on Linux, in a container or a virtual machine.",
    source="Supported platforms.",
    needs=("system",),
    on_vllm=True,
)
def not_linux(context: Context) -> Iterator[Found]:
    """This system is not Linux.

    Processes, shared memory and devices are handled in ways that only Linux has; check-config works
    everywhere.
    """
    if context.machine.system != "Linux":
        yield Found("system", f"serve needs Linux, this is {context.machine.system}")


@rule(
    "PD410",
    "error",
    fix=(
        "Set device: cpu, or check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU option."
    ),
    source="cuInit and cuDeviceGetCount.",
    needs=("gpus",),
    on_vllm=True,
)
def no_gpu(context: Context) -> Iterator[Found]:
    """Engines are to run on GPUs, but there is none.

    The driver shows no CUDA device to this process.
    """
    for engine in context.on("cuda"):
        if engine.gpus or engine.gpus_problem:
            continue  # PD450 speaks of a variable that is wrong.
        variable = engine.given_environ.get(VISIBLE_DEVICES)
        hidden = "" if variable is None else f" ({VISIBLE_DEVICES} is {shown(variable)})"
        reason = "" if context.machine.gpus else f": {context.machine.cumem.reason}"
        message = f"device is cuda, but no CUDA device is visible{hidden}{reason}"
        yield Found(engine.where("device"), message)


@rule(
    "PD451",
    "warning",
    fix=(
        "Check nvidia-smi, and give the container the GPUs (docker run --gpus all); or set device: "
        "cpu."
    ),
    source="The PCI bus, and cuDeviceGetCount.",
    needs=("gpus",),
)
def gpus_out_of_sight(context: Context) -> Iterator[Found]:
    """The engines run on the CPU of a host whose GPUs the driver does not show.

    Nobody chose the CPU: the driver is missing or broken, or the container was not given the GPUs.
    A CUDA_VISIBLE_DEVICES that hides them is a choice.
    """
    for engine in context.on("cpu"):
        chosen = engine.settings.device == "cpu" or VISIBLE_DEVICES in engine.given_environ
        if context.machine.has_hidden_gpus and not chosen:
            message = f"{engine.role} runs on the CPU, though this host has NVIDIA GPUs"
            yield Found(engine.where("device"), message)


@rule(
    "PD411",
    "error",
    fix="Lower tensor_parallel_size.",
    source="NCCL: one rank a device.",
    needs=("gpus",),
    on_vllm=True,
)
def too_few_gpus(context: Context) -> Iterator[Found]:
    """There are fewer GPUs than one engine has ranks.

    Two ranks of one engine on a device would wait for each other in collective operations that need
    a device each.
    """
    for engine in context.on("cuda"):
        there = len(engine.gpus)
        # PD410 speaks of ranks that see no GPU.
        if there and engine.tp_size > there:
            message = f"a {engine.role} engine has {engine.tp_size} ranks, which see {there} GPUs"
            yield Found(engine.where("tensor_parallel_size"), message, f"set it to {there} or less")


@rule(
    "PD450",
    "error",
    fix=(
        "Name GPUs that the launch itself sees, by number or UUID and each once; or leave "
        "CUDA_VISIBLE_DEVICES out, and pdlaunch gives each rank a GPU."
    ),
    source="CUDA 13 on two H200s: what cuInit and cuDeviceGetCount make of the variable.",
    needs=("gpus",),
    on_vllm=True,
)
def visible_devices_wrong(context: Context) -> Iterator[Found]:
    """CUDA_VISIBLE_DEVICES of a role names GPUs that its ranks cannot have.

    CUDA forgets what comes after an entry that it cannot use, and shows no GPU where one is named
    twice: ranks would end at their start, or compute on other GPUs than were meant. As in every
    process, the numbers are those of the machine, whatever the launch's own variable lists; ranks
    number the GPUs that they see from 0.
    """
    for engine in context.engines.values():
        if engine.gpus_problem:
            value = shown(engine.given_environ[VISIBLE_DEVICES])
            yield Found(
                context.where_variable(engine, VISIBLE_DEVICES),
                f"{VISIBLE_DEVICES} of {engine.role} is {value}: {engine.gpus_problem}",
            )


@rule(
    "PD412",
    "warning",
    fix="Use fewer engines, or more cores.",
    source="Measured on 2 cores.",
    needs=("cpus",),
    on_vllm=True,
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
    needs=("native_bf16",),
    on_vllm=True,
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
    """The limit of locked memory is too low for RDMA.

    Registering the KV cache with an RDMA device locks it, and beyond the limit fails. Mooncake uses
    RDMA with the protocol rdma, NIXL to peers on other hosts, where kv_transfer.trusted_network
    lets it.
    """
    limit = context.machine.limits.memlock_bytes
    transfer = context.config.kv_transfer
    by_mooncake = context.uses("mooncake") and transfer.mooncake.protocol == "rdma"
    if limit == UNLIMITED or not context.machine.rdma_devices:
        return
    for engine in context.engines.values():
        needed = engine.footprint
        by_nixl = context.uses_ucx and not RDMA.isdisjoint(engine.ucx_transports)
        if needed is not None and needed.kv_bytes > limit and (by_mooncake or by_nixl):
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
    on_vllm=True,
)
def open_files_low(context: Context) -> Iterator[Found]:
    """The limit of open files is low.

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
    "PD419",
    "error",
    fix=(
        "Name a folder that the user of the launch may write to, or may create "
        "(--kv-file-directory)."
    ),
    source="A file is written there and removed; the ranks make the folder at their start.",
    needs=("folders",),
)
def folder_not_writable(context: Context) -> Iterator[Found]:
    """The folder of connector file cannot be written to.

    The ranks put their KV blocks there and would refuse to start. All hosts must have the folder;
    only this machine is checked.
    """
    for where, problem in (context.probes.folder_problems or {}).items():
        yield Found(where, problem)
