"""Rules PD20x and PD21x judge memory settings, and whether everything fits."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.facts import Gpu
from pdlaunch.planning.role_engines import RoleEngines


@rule(
    "PD201",
    "error",
    fix="Remove enable_cumem_allocator (sleep mode turns it on), or switch enable_sleep_mode off.",
    source="The CUDA driver's virtual memory management.",
    on_vllm=True,
)
def sleep_without_allocator(context: Context) -> Iterator[Found]:
    """Sleep mode is on, and the CuMem allocator that it needs is off.

    Sleep frees the physical memory behind weights and KV cache and keeps the addresses; only CuMem
    pools can.
    """
    for engine in context.engines.values():
        if engine.cumem_allocator is None:
            message = "enable_sleep_mode is on, but enable_cumem_allocator is false"
            yield Found(engine.where("enable_cumem_allocator"), message)


@rule(
    "PD202",
    "error",
    fix="Remove enable_cumem_allocator, or run on a CUDA device.",
    source="CuMem pools: memory of a CUDA device.",
    on_vllm=True,
)
def allocator_on_cpu(context: Context) -> Iterator[Found]:
    """The CuMem allocator is not supported on the current platform.

    The engines run on a CPU, and CuMem pools are memory of CUDA devices. The allocator is never
    silently left out: what relies on it (sleep, sharing with peers) would fail later.
    """
    for engine in context.on("cpu"):
        if engine.settings.enable_cumem_allocator:
            message = (
                f"cumem allocator is not supported on the current platform: {_on_cpu(context)}"
            )
            yield Found(engine.where("enable_cumem_allocator"), message)


@rule(
    "PD203",
    "error",
    fix="Switch enable_sleep_mode off, or run on a CUDA device.",
    source="CuMem pools: memory of a CUDA device.",
    on_vllm=True,
)
def sleep_on_cpu(context: Context) -> Iterator[Found]:
    """Sleep mode is not supported on the current platform.

    Sleep mode needs the CuMem allocator, and the engines run on a CPU.
    """
    for engine in context.on("cpu"):
        if engine.settings.enable_sleep_mode:
            message = (
                "sleep mode is not supported on the current platform: cumem allocator is not "
                f"supported: {_on_cpu(context)}"
            )
            yield Found(engine.where("enable_sleep_mode"), message)


def _on_cpu(context: Context) -> str:
    cumem = context.machine.cumem
    detail = "" if cumem.available or "cumem" in context.missing else f" ({cumem.reason})"
    return f"the engines run on a CPU{detail}"


@rule(
    "PD215",
    "error",
    fix="Switch enable_cumem_allocator and enable_sleep_mode off, or update the CUDA driver.",
    source="cuDeviceGetAttribute(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED).",
    needs=("gpus", "cumem"),
    on_vllm=True,
)
def allocator_without_driver(context: Context) -> Iterator[Found]:
    """The CUDA driver or a GPU does not support the CuMem allocator.

    The allocator, and with it sleep mode, needs virtual memory management of the driver on every
    device. It is never silently left out.
    """
    if context.machine.cumem.available:
        return
    for engine in context.on("cuda"):
        for name in ("enable_cumem_allocator", "enable_sleep_mode"):
            if getattr(engine.settings, name):
                message = f"cumem allocator is not supported: {context.machine.cumem.reason}"
                yield Found(engine.where(name), message)


@rule(
    "PD207",
    "error",
    fix=(
        "Use more ranks, a smaller dtype, a smaller max_num_batched_tokens (activations), "
        "max_model_len or kv_cache_memory (KV cache), or a larger gpu_memory_utilization; or stop "
        "the processes that hold the GPU's memory (nvidia-smi shows them)."
    ),
    source="The model's config.json, the driver, and NVML for the memory that is free.",
    needs=("model", "gpus", "gpu_memory"),
    on_vllm=True,
)
def gpu_memory_exceeded(context: Context) -> Iterator[Found]:
    """Weights, activations and KV cache do not fit into the memory of a GPU.

    The engine would end with an out-of-memory error, at start or under load. Memory that other
    processes hold now does not count as there, where the driver tells how much that is; of a
    machine that is assumed by name it does not.
    """
    for index, ranks in _ranks_by_gpu(context).items():
        gpu = context.machine.gpus[index]
        for engine in ranks:
            needed = engine.footprint
            if gpu.memory_bytes is None or needed is None:
                continue
            share = engine.settings.gpu_memory_utilization
            # A rank that is given the size of its KV cache does not ask for its share.
            given = bool(engine.settings.kv_cache_memory)
            budget = gpu.memory_bytes if given else int(gpu.memory_bytes * share)
            if needed.total_bytes <= min(budget, gpu.memory_bytes - gpu.held_bytes):
                continue
            size = format_size(gpu.memory_bytes)
            message = f"a {engine.role} rank needs {needed.arithmetic()}, GPU {index}"
            if needed.total_bytes <= budget:
                yield Found(
                    engine.where("tensor_parallel_size"),
                    f"{message} has {size}, of which {_held(gpu)}",
                    f"stop the processes that hold memory of GPU {index} (nvidia-smi shows them)",
                )
            else:
                gives = size if given else f"{share:g} x {size} = {format_size(budget)}"
                yield Found(engine.where("tensor_parallel_size"), f"{message} gives {gives}")


@rule(
    "PD210",
    "error",
    fix=(
        "Lower gpu_memory_utilization of the engines that share a device, set kv_cache_memory, use "
        "fewer engines, or stop other processes that hold the GPU's memory."
    ),
    source="How ranks are placed: in turn over all GPUs.",
    needs=("gpus", "model", "gpu_memory"),
    on_vllm=True,
)
def gpu_shares_exceeded(context: Context) -> Iterator[Found]:
    """Ranks on one GPU together want more memory than it has.

    Each rank takes its share of the whole device, so that the last one to start finds too little.
    What other processes hold is not there, where the driver tells how much that is.
    """
    for index, ranks in _ranks_by_gpu(context).items():
        gpu = context.machine.gpus[index]
        memory = gpu.memory_bytes
        if memory is None or sum(ranks.values()) < 2:
            continue
        wants = {engine: _wanted_bytes(engine, memory) for engine in ranks}
        total = sum(count * wants[engine] for engine, count in ranks.items())
        free = memory - gpu.held_bytes
        if total > free:
            parts = " + ".join(
                f"{count} {engine.role} x {format_size(wants[engine])}"
                for engine, count in ranks.items()
            )
            message = f"GPU {index}: {parts} = {format_size(total)} of {format_size(memory)}"
            if total <= memory:
                message += f", of which {_held(gpu)}"
            sized = [engine for engine in ranks if _is_sized(engine)]
            if sized:
                # The share of such an engine does nothing.
                names = [
                    f"{'kv_cache_memory' if engine in sized else 'gpu_memory_utilization'} of "
                    f"{engine.role}"
                    for engine in ranks
                ]
                fix = f"lower {' and '.join(names)}, or use fewer engines"
                yield Found(sized[0].where("kv_cache_memory"), message, fix)
                continue
            # What CUDA contexts take is in no engine's share: 5 % are left for them.
            share = min(0.9, 0.95 * free / memory / sum(ranks.values()))
            yield Found(
                "gpu_memory_utilization",
                message,
                f"set gpu_memory_utilization to {share:.2f} or less",
            )


def _held(gpu: Gpu) -> str:
    return f"other processes hold {format_size(gpu.held_bytes)} now"


def _ranks_by_gpu(context: Context) -> dict[int, dict[RoleEngines, int]]:
    """Return for each GPU how many ranks of which engines run on it."""
    return {
        gpu: {
            engine: num_ranks
            for engine in context.on("cuda")
            if (num_ranks := engine.num_ranks_on(gpu))
        }
        for gpu in range(len(context.machine.gpus))
    }


def _wanted_bytes(engine: RoleEngines, memory: int) -> int:
    if (needed := engine.footprint) is not None and _is_sized(engine):
        return needed.total_bytes
    return int(memory * engine.settings.gpu_memory_utilization)


def _is_sized(engine: RoleEngines) -> bool:
    """Tell whether an engine wants what its parts come to, and no share of the GPU."""
    return engine.settings.kv_cache_memory is not None and engine.footprint is not None


@rule(
    "PD211",
    "warning",
    fix="Use as many GPUs as there are ranks, or fewer engines.",
    source="How ranks are placed: in turn over all GPUs.",
    needs=("gpus",),
    on_vllm=True,
)
def gpu_shared(context: Context) -> Iterator[Found]:
    """Ranks of different engines share a GPU.

    Prefill and decode then slow each other down, which is what disaggregation is meant to avoid.
    """
    shared = [index for index, ranks in _ranks_by_gpu(context).items() if sum(ranks.values()) > 1]
    if shared:
        num_ranks = sum(engine.num_ranks for engine in context.on("cuda"))
        yield Found(
            "device",
            (
                f"{num_ranks} ranks on {len(context.machine.gpus)} GPUs: {len(shared)} of them are "
                "shared"
            ),
        )


@rule(
    "PD212",
    "error",
    fix="Lower kv_cache_memory or the number of engines, or use a smaller model.",
    source="The model's config.json and the machine (its control group included).",
    needs=("model", "memory"),
    on_vllm=True,
)
def host_memory_exceeded(context: Context) -> Iterator[Found]:
    """The engines on the CPU need more memory than the machine has.

    The kernel would end a process in the middle of loading, or under load.
    """
    needs = {engine: engine.footprint for engine in context.on("cpu") if engine.footprint}
    total = sum(engine.num_ranks * needed.total_bytes for engine, needed in needs.items())
    if total > context.machine.memory_bytes:
        parts = "; ".join(
            f"{e.num_ranks} {e.role} ranks: {needed.arithmetic()} each"
            for e, needed in needs.items()
        )
        message = (
            f"{parts}; together {format_size(total)} of {format_size(context.machine.memory_bytes)}"
        )
        yield Found(next(iter(needs)).where("kv_cache_memory"), message)


@rule(
    "PD213",
    "warning",
    fix=(
        "Let kv_transfer.nixl.path be auto or p2p, switch the CuMem allocator off, or give the "
        "host an IMEX channel."
    ),
    source=(
        "Measured on two H200s with NIXL 1.5.1; vLLM 0.24 with --enable-cumem-allocator: 0.44 "
        "GB/s, HTTP 200."
    ),
    needs=("gpus", "fabric"),
)
def cumem_without_fabric(context: Context) -> Iterator[Found]:
    """The KV cache lies in CuMem memory that the connector cannot map: this host has no fabric
    handles.

    Without an IMEX channel the driver does not export CuMem allocations as fabric handles, and
    NIXL/UCX falls back to copying through the host: 0.6 GB/s instead of 392 GB/s (the silent
    cliff), also with UCX_CUDA_IPC_ENABLE_MNNVL=y. The path p2p maps such memory by its POSIX file
    descriptors instead.
    """
    if not context.moves_cumem_slowly:
        return
    for engine in context.on("cuda"):
        if engine.cumem_allocator:
            message = (
                f"connector {context.config.kv_transfer.connector} moves CuMem memory at 0.6 GB/s "
                "on hosts without fabric handles"
            )
            name = cumem_setting(engine)
            # Other connectors do not look at the path.
            path = "let kv_transfer.nixl.path be auto or p2p"
            other = path if context.uses("nixl") else "use connector nixl"
            fix = f"{other}, switch {name} off, or give the host an IMEX channel"
            yield Found(engine.where(name), message, fix)


def cumem_setting(engine: RoleEngines) -> str:
    """Return the setting by which an engine has CuMem pools: sleep mode brings them, too."""
    asked = engine.settings.enable_cumem_allocator
    return "enable_cumem_allocator" if asked else "enable_sleep_mode"
