"""Rules PD204 to PD206 and PD216 judge the configuration of torch's allocator."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.machine.allocator_conf import HIP_VARIABLE, VARIABLES, read_allocator_conf

_TORCH = "Compared with torch 2.13.0 (libc10, libc10_cuda), and with torch 2.11.0 on an H200."


@rule(
    "PD204",
    "error",
    fix=(
        "Remove expandable_segments from the environment, or allocate the KV cache elsewhere: "
        "--enable-cumem-allocator, --enable-sleep-mode, or kv_transfer.nixl.path: p2p."
    ),
    source=f"Measured on two H200s with NIXL 1.5.1. {_TORCH}",
)
def expandable_segments(context: Context) -> Iterator[Found]:
    """A KV connector is used together with torch's expandable_segments.

    Expandable segments have no handle that a peer can open: NIXL/UCX moves such memory at 0.6 GB/s
    instead of 392 GB/s between two NVLink GPUs, without an error. CuMem pools switch expandable
    segments off for their own allocations, and so does a KV cache that peers only map (path p2p);
    connector file goes through host memory. The setting is read as torch does:
    PYTORCH_CUDA_ALLOC_CONF over PYTORCH_HIP_ALLOC_CONF over PYTORCH_ALLOC_CONF, the first that is
    set (even if empty) alone, contrary to a comment in torch's header; white space does not count,
    the last of repeated keys wins. `true` and `1` are taken as they are meant, though torch refuses
    them (PD205).
    """
    if not context.config.kv_transfer.opens_device_memory:
        return
    elsewhere = "--enable-cumem-allocator or --enable-sleep-mode"
    if context.uses("nixl"):
        elsewhere = "--enable-cumem-allocator, --enable-sleep-mode or kv_transfer.nixl.path: p2p"
    for engine in context.peers("cuda"):
        conf = read_allocator_conf(engine.given_environ)
        if conf.variable and conf.expandable_segments and engine.cumem_allocator is False:
            yield Found(
                context.where_variable(engine, conf.variable),
                f"{conf.variable} switches expandable_segments on, which connector "
                f"{context.config.kv_transfer.connector} cannot move fast",
                f"take expandable_segments out of {conf.variable}, or use {elsewhere}",
            )


@rule(
    "PD205",
    "error",
    fix=(
        "Write key:value, with commas between them: "
        "expandable_segments:False,max_split_size_mb:128."
    ),
    source=_TORCH,
    on_vllm=True,
)
def allocator_conf_refused(context: Context) -> Iterator[Found]:
    """torch refuses the configuration of its allocator.

    The process ends with an exception when it first uses its GPU. torch refuses keys that it does
    not know (also in other letters, and quotes belong to the key), keys without a value, commas
    without a key, and values out of range; `True` and `False` are its only truth values. Engines on
    a CPU do not read the variables, but a build of torch for CUDA ends every process that imports
    it when a key has no value.
    """
    with_cuda = "libraries" not in context.missing and context.machine.libraries.torch_cuda
    for engine in context.engines.values():
        refusal = read_allocator_conf(engine.given_environ).refusal
        if refusal is not None and (engine.device == "cuda" or (refusal.at_import and with_cuda)):
            yield Found(context.where_variable(engine, refusal.variable), refusal.reason)


@rule(
    "PD216",
    "error",
    fix="Take backend:cudaMallocAsync out of the variable.",
    source=(
        "Measured on an H200 with torch 2.11.0: cuIpcGetMemHandle says CUDA_ERROR_INVALID_VALUE, "
        "MemPool is not supported."
    ),
    on_vllm=True,
)
def allocator_backend(context: Context) -> Iterator[Found]:
    """torch's allocator is cudaMallocAsync, whose memory can be neither pooled nor shared.

    CuMem pools (sleep mode too) need torch's native allocator: a rank would end when it opens them.
    A KV cache of cudaMallocAsync has no handle that a peer could open, so neither NIXL nor the path
    p2p can map it. The connector file does without.
    """
    transfer = context.config.kv_transfer
    is_shared = transfer.opens_device_memory or transfer.maps_memory
    peers = list(context.peers()) if is_shared else []
    for engine in context.on("cuda"):
        conf = read_allocator_conf(engine.given_environ)
        if conf.backend != "cudaMallocAsync" or not (engine.cumem_allocator or engine in peers):
            continue
        what = "has no CuMem pools" if engine.cumem_allocator else "has no handle for peers"
        # What HIP's variable says of the backend is not read.
        name = next(
            name for name in VARIABLES if name != HIP_VARIABLE and name in engine.given_environ
        )
        yield Found(
            context.where_variable(engine, name), f"memory of backend:cudaMallocAsync {what}"
        )


@rule(
    "PD206",
    "warning",
    fix="Keep one of them.",
    source=_TORCH,
    on_vllm=True,
)
def several_allocator_variables(context: Context) -> Iterator[Found]:
    """Several variables configure torch's allocator, and torch reads one of them.

    The order is PYTORCH_CUDA_ALLOC_CONF over PYTORCH_HIP_ALLOC_CONF over PYTORCH_ALLOC_CONF; the
    others are ignored as a whole, not merged.
    """
    for engine in context.on("cuda"):
        conf = read_allocator_conf(engine.given_environ)
        values = {
            engine.given_environ[name]
            for name in (conf.variable, *conf.ignored)
            if name is not None
        }
        # Equal values do no harm, whichever of them is read.
        if len(values) > 1:
            ignored = " and ".join(conf.ignored)
            yield Found(
                context.where_variable(engine, conf.ignored[0]),
                f"torch reads {conf.variable} and ignores {ignored}",
            )
