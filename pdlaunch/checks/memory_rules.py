"""Rules PD2xx judge memory settings, and whether engines fit into memory."""

from collections.abc import Iterator

from pdlaunch.checks.rule import Context, Found, error, warning
from pdlaunch.config.roles import PAIR
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.facts import Gpu
from pdlaunch.machine.host import expandable_segments_variable
from pdlaunch.planning.role_engines import RoleEngines

# A KV cache that cannot hold a request of this length is a mistake, unless max_model_len is shorter
USEFUL_TOKENS = 256
MOST_OF_A_GPU = 0.97  # CUDA and NCCL held 4.6 of 178 GiB at that time, in a group of 16 ranks
_PLACEMENT = "How ranks are placed: in turn over all GPUs."
_TIER = "kv_offload.host_memory"
_NEED_CUMEM = {"enable_cumem_allocator": "cumem allocator", "enable_sleep_mode": "sleep mode"}


def cumem_setting(each: RoleEngines) -> str:
    """Return the setting that gives an engine CuMem pools; sleep mode does so too."""
    asked = each.settings.enable_cumem_allocator
    return "enable_cumem_allocator" if asked else "enable_sleep_mode"


def _no_cumem(context: Context) -> Iterator[Found]:
    problem = "" if "cumem" in context.missing else context.machine.cumem_problem
    for each in context.engines.values():
        reason = problem if context.machine.gpus else ""
        if each.device == "cpu":
            reason = f"the engines run on a CPU{f' ({problem})' if problem else ''}"
        for name, what in _NEED_CUMEM.items():
            if reason and getattr(each.settings, name):
                yield Found(
                    f"{what} is not supported on the current platform: {reason}", each.where(name)
                )


def _segments(context: Context) -> Iterator[Found]:
    connector = context.kv_transfer.connector
    elsewhere = "--enable-cumem-allocator or --enable-sleep-mode"
    if context.uses_ucx:
        elsewhere = "--enable-cumem-allocator, --enable-sleep-mode or kv_transfer.nixl.path: p2p"
    for each in context.pair or ():
        name = expandable_segments_variable(each.given_environ)
        is_used = each.device == "cuda" and not each.cumem_allocator
        if name is not None and is_used and _is_opened_by_library(context, each):
            yield Found(
                f"{name} switches expandable_segments on, and connector {connector} moves such "
                "memory slowly",
                context.where_variable(each, name),
                f"remove expandable_segments from {name}, or use {elsewhere}",
            )


def _cumem_without_fabric(context: Context) -> Iterator[Found]:
    carrier = context.kv_transfer.connector_section
    for each in context.on_cuda() if context.pair else ():
        if each.role not in PAIR or not each.cumem_allocator:
            continue
        has_fabric = all(gpu.has_fabric_handles is not False for gpu in context.machine.gpus)
        if carrier.maps_memory or has_fabric or not _is_opened_by_library(context, each):
            continue
        # Other connectors ignore kv_transfer.nixl.path.
        path = "set kv_transfer.nixl.path to auto or p2p"
        other = f"{path}, " if context.uses_ucx else ""
        name = cumem_setting(each)
        yield Found(
            f"connector {context.kv_transfer.connector} moves CuMem memory at 0.6 GB/s on hosts "
            "without fabric handles",
            each.where(name),
            f"{other}switch {name} off, or give the host an IMEX channel",
        )


def _is_opened_by_library(context: Context, each: RoleEngines) -> bool:
    """Return True if a library opens the engine's GPU memory; peers cannot map vLLM's pools."""
    carrier = context.kv_transfer.connector_section
    return carrier.opens_device_memory or (carrier.maps_memory and not each.is_native)


def _ranks_by_gpu(context: Context) -> dict[int, dict[RoleEngines, int]]:
    return {
        gpu: {each: count for each in context.on_cuda() if (count := each.num_ranks_on(gpu))}
        for gpu in range(len(context.machine.gpus))
    }


def _held(gpu: Gpu) -> str:
    return f"other processes hold {format_size(gpu.held_bytes)} now"


def _gpu_memory(context: Context) -> Iterator[Found]:
    for index, ranks in _ranks_by_gpu(context).items():
        gpu = context.machine.gpus[index]
        for each in ranks:
            needed = each.footprint
            if gpu.memory_bytes is None or needed is None:
                continue
            share = each.settings.gpu_memory_utilization
            # gpu_memory_utilization does not limit a rank with a given size of its KV cache.
            given = bool(each.settings.kv_cache_memory)
            budget = gpu.memory_bytes if given else int(gpu.memory_bytes * share)
            if needed.total_bytes <= min(budget, gpu.memory_bytes - gpu.held_bytes):
                continue
            size = format_size(gpu.memory_bytes)
            message = f"a {each.role} rank needs {needed.arithmetic()}"
            place = each.where("tensor_parallel_size")
            if needed.total_bytes <= budget:
                fix = f"stop the processes that hold memory of GPU {index} (nvidia-smi shows them)"
                held = f"GPU {index} has {size}, of which {_held(gpu)}"
                yield Found(f"{message}, {held}", place, fix)
            else:
                gives = size if given else f"{share:g} x {size} = {format_size(budget)}"
                yield Found(f"{message}, a GPU has {gives} for it", place)  # once for equal GPUs


def _gpu_shares(context: Context) -> Iterator[Found]:
    for index, ranks in _ranks_by_gpu(context).items():
        gpu = context.machine.gpus[index]
        memory = gpu.memory_bytes
        if memory is None or not ranks:
            continue
        sized = {
            each: each.footprint.total_bytes
            for each in ranks
            if each.settings.kv_cache_memory is not None and each.footprint is not None
        }
        shares = {each: int(memory * each.settings.gpu_memory_utilization) for each in ranks}
        wants = shares | sized
        # Each rank takes its share of the whole GPU, not of the free memory: the sum decides.
        total = sum(count * wants[each] for each, count in ranks.items())
        free = memory - gpu.held_bytes
        if total <= free or sum(ranks.values()) == 1:
            for each in ranks:
                yield from _late_share(index, free - (total - wants[each]), each, shares[each])
            continue
        parts = " + ".join(
            f"{count} {each.role} x {format_size(wants[each])}" for each, count in ranks.items()
        )
        message = f"GPU {index}: {parts} = {format_size(total)} of {format_size(memory)}"
        if total <= memory:
            message += f", of which {_held(gpu)}"
        if sized:  # gpu_memory_utilization has no effect on these engines.
            names = [
                f"{'kv_cache_memory' if each in sized else 'gpu_memory_utilization'} of {each.role}"
                for each in ranks
            ]
            fix = f"lower {' and '.join(names)}, or use fewer engines"
            yield Found(message, next(iter(sized)).where("kv_cache_memory"), fix)
        else:
            # No engine's share includes its CUDA contexts: 5 % are left for them.
            share = min(0.9, 0.95 * free / memory / sum(ranks.values()))
            fix = f"set gpu_memory_utilization to {share:.2f} or less"
            yield Found(message, "gpu_memory_utilization", fix)


def _late_share(index: int, left: int, each: RoleEngines, share: int) -> Iterator[Found]:
    """Find out whether vLLM needs more free GPU memory at its start than others leave."""
    if not each.is_native and share > left:
        asks = f"{format_size(share)} of free memory on GPU {index}, but other ranks leave"
        # Rounded down, to leave room for CUDA contexts.
        fits = max(1, int(95 * each.settings.gpu_memory_utilization * left / share)) / 100
        sized = "; kv_cache_memory alone then sets the size of the KV cache"
        yield Found(
            f"a {each.role} rank of vLLM needs at its start {asks} {format_size(left)}",
            each.where("gpu_memory_utilization"),
            f"set gpu_memory_utilization to {fits:g} or less"
            + sized * (each.settings.kv_cache_memory is not None),
        )


def _shared_gpus(context: Context) -> str:
    shared = [index for index, ranks in _ranks_by_gpu(context).items() if sum(ranks.values()) > 1]
    return f"more than one rank on GPU {', '.join(map(str, shared))}" if shared else ""


def _host_memory(context: Context) -> Iterator[Found]:
    # On a CPU, the ranks of all roles share the memory of the host.
    needs = {each: each.footprint for each in context.on_cpu() if each.footprint}
    tiers = [each for each in context.engines.values() if each.host_tier_bytes]
    total = sum(each.num_ranks * needed.total_bytes for each, needed in needs.items())
    total += sum(each.num_ranks * each.host_tier_bytes for each in tiers)
    if total > context.machine.memory_bytes:
        uses = [(each, f"{needed.arithmetic()} each") for each, needed in needs.items()]
        uses += [(each, f"{format_size(each.host_tier_bytes)} of host tier") for each in tiers]
        parts = "; ".join(f"{each.num_ranks} {each.role} ranks: {use}" for each, use in uses)
        there = format_size(context.machine.memory_bytes)
        place = tiers[0].where(_TIER) if tiers else next(iter(needs)).where("kv_cache_memory")
        yield Found(f"{parts}; together {format_size(total)} of {there}", place)


def _too_small(each: RoleEngines) -> Found | None:
    needed, kv_bytes, tokens = each.footprint, each.kv_cache_bytes, each.max_model_len
    if needed is None or kv_bytes is None or tokens is None:
        return None
    if each.settings.max_model_len is None:
        tokens = min(USEFUL_TOKENS, tokens)
    least_bytes = needed.kv_bytes_for(tokens)
    if least_bytes <= kv_bytes:
        return None
    fits = needed.longest_request_tokens(kv_bytes)
    shorter = f"set max_model_len to {fits} or less, or " if fits else ""
    return Found(
        f"a request of {tokens} tokens needs {format_size(least_bytes)} on each {each.role} rank, "
        f"kv_cache_memory is {format_size(kv_bytes)}",
        fix=f"{shorter}set kv_cache_memory to {-(-least_bytes // 1024**2)}MiB or more",
    )


def _lone_tier(each: RoleEngines) -> str:
    size = format_size(each.host_tier_bytes)
    is_lone = each.host_tier_bytes and not each.settings.enable_prefix_caching
    return f"{_TIER} is {size}, but enable_prefix_caching is false" if is_lone else ""


# fmt: off
RULES = (
    error("PD201", "Sleep mode is on, but the CuMem allocator that it needs is off.",
        "Sleep frees the physical memory of weights and KV cache and keeps the addresses. Only "
        "CuMem pools can do this.",
        over=Context.roles, when=lambda each: each.cumem_allocator is None,
        at="enable_cumem_allocator",
        message="enable_sleep_mode is on, but enable_cumem_allocator is false",
        fix="Remove enable_cumem_allocator (sleep mode turns it on), or switch enable_sleep_mode "
        "off.", source="The CUDA driver's virtual memory management."),
    error("PD202", "The CuMem allocator, or sleep mode, is not supported on the current platform.",
        "CuMem pools are memory of CUDA devices and need virtual memory management of the driver "
        "on each device. Sleep mode needs the pools. pdlaunch never silently omits them.",
        when=_no_cumem,
        fix="Switch enable_cumem_allocator and enable_sleep_mode off, run on a CUDA device, or "
        "update its driver.",
        source="cuDeviceGetAttribute(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED).", needs=("gpus",)),
    error("PD204", "A KV connector is used together with torch's expandable_segments.",
        "Expandable segments have no handle that a peer can open: NIXL/UCX moves such memory at "
        "0.6 GB/s instead of 392 GB/s between two NVLink GPUs, without an error. CuMem pools "
        "switch expandable segments off for their own allocations. torch reads the first of "
        "PYTORCH_CUDA_ALLOC_CONF, PYTORCH_HIP_ALLOC_CONF and PYTORCH_ALLOC_CONF that is set, even "
        "if empty.",
        when=_segments,
        fix="Remove expandable_segments from the environment, or allocate the KV cache elsewhere: "
        "--enable-cumem-allocator, --enable-sleep-mode, or kv_transfer.nixl.path: p2p.",
        source="Measured on two H200s with NIXL 1.5.1 and torch 2.11.0; vLLM 0.32 refuses only "
        "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF."),
    error("PD207", "Weights, activations and KV cache do not fit into the memory of a GPU.",
        "The engine would end with an out-of-memory error, at its start or under load. Memory that "
        "other processes hold now is subtracted, if the driver reports it.",
        when=_gpu_memory,
        fix="Use more ranks, a smaller dtype, a smaller max_num_batched_tokens (activations), "
        "max_model_len or kv_cache_memory (KV cache), or a larger gpu_memory_utilization; or stop "
        "the processes that hold the GPU's memory (nvidia-smi shows them).",
        source="The model's config.json, the driver, and NVML for the free memory.",
        needs=("model", "gpus", "gpu_memory")),
    error("PD208",
        "The KV cache cannot hold one request of max_model_len, or of 256 tokens if that is not "
        "set.",
        "A request that needs more blocks than the cache has can never run. The engine refuses it "
        "although it is within max_model_len.",
        over=Context.roles, when=_too_small, at="kv_cache_memory",
        fix="Raise kv_cache_memory, or lower max_model_len.",
        source="Number of KV blocks against the longest request.", needs=("model",)),
    error("PD210", "Ranks that share a GPU need more memory than it has.",
        "Each rank takes its share of the whole device, so too little is left for the last rank "
        "to start.",
        when=_gpu_shares,
        fix="Lower gpu_memory_utilization of the engines that share a device, set "
        "kv_cache_memory, use fewer engines, or stop other processes that hold the GPU's memory.",
        source=_PLACEMENT, needs=("gpus", "model", "gpu_memory")),
    warning("PD211", "Ranks of different engines share a GPU.",
        "Prefill and decode then slow each other down, which disaggregation is meant to prevent.",
        when=_shared_gpus, at="device",
        fix="Use as many GPUs as there are ranks, or fewer engines.", source=_PLACEMENT,
        needs=("gpus",)),
    error("PD212", "Engines on the CPU and host tiers need more memory than the machine has.",
        "The kernel would kill a process while it loads, or under load. Every rank allocates "
        "kv_offload.host_memory at its start.",
        when=_host_memory,
        fix="Lower kv_cache_memory, kv_offload.host_memory (of one rank) or the number of engines, "
        "or use a smaller model.",
        source="The model's config.json and the machine (its control group included).",
        needs=("memory",)),
    warning("PD222", "An engine of vLLM asks for nearly all of a GPU.",
        "The whole share has to be free at the start of the engine, but contexts of CUDA and NCCL "
        "already hold some GB then. The engine exits at every attempt.",
        over=Context.on_cuda,
        when=lambda each: not each.is_native
        and each.settings.gpu_memory_utilization > MOST_OF_A_GPU,
        at="gpu_memory_utilization",
        message="gpu_memory_utilization is {0.settings.gpu_memory_utilization:g}",
        fix=f"Set gpu_memory_utilization to {MOST_OF_A_GPU} or less.",
        source="aws-samples/aws-do-eks#79; vllm/v1/worker/utils.py, request_memory.",
        needs=("gpus",)),
    warning("PD213",
        "The KV cache is in CuMem memory that the connector cannot map: this host has no fabric "
        "handles.",
        "Without an IMEX channel the driver does not export CuMem allocations as fabric handles. "
        "NIXL/UCX then silently copies through the host: 0.6 GB/s instead of 392 GB/s, also with "
        "UCX_CUDA_IPC_ENABLE_MNNVL=y. The path p2p maps such memory by its POSIX file "
        "descriptors.",
        when=_cumem_without_fabric,
        fix="Set kv_transfer.nixl.path to auto or p2p, turn the CuMem allocator off, or set "
        "up an IMEX channel on the host.",
        source="Measured on two H200s with NIXL 1.5.1; vLLM 0.24 with --enable-cumem-allocator: "
        "0.44 GB/s, HTTP 200.", needs=("gpus", "fabric")),
    error("PD220", "The host tier does not work without the prefix cache.",
        "It stores and finds blocks by the hashes that prefix caching computes.",
        over=Context.roles, when=_lone_tier, at="enable_prefix_caching",
        fix="Switch enable_prefix_caching on, or remove kv_offload.",
        source="The host tier is content-addressed by the hashes of the prefix cache.",
        native_alone=True),
)
# fmt: on
