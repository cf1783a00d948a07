"""Rules PD3xx judge which settings must be equal, or fit, between prefill and decode engines.

vLLM sees these at the first request, when both engines are already "healthy".
"""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.memory_rules import cumem_setting
from pdlaunch.checks.rule import Found, rule
from pdlaunch.planning.role_engines import RoleEngines

KV_LAYOUT = "pdlaunch's KV layout and handshake."


@rule(
    "PD303",
    "error",
    fix="Set dtype once, at the top level.",
    source=KV_LAYOUT,
    on_vllm=True,
)
def dtypes_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode use different dtypes.

    KV blocks are handed over as bytes: in another dtype they are other numbers.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = pair
    if prefill.dtype and decode.dtype and prefill.dtype != decode.dtype:
        message = f"prefill computes in {prefill.dtype}, decode in {decode.dtype}"
        yield Found(differing_place(prefill, decode, "dtype"), message)


@rule(
    "PD304",
    "error",
    fix="Set block_size once, at the top level.",
    source=KV_LAYOUT,
)
def block_sizes_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode use different block sizes.

    Blocks are handed over whole, and their hashes chain over block_size tokens each.
    """
    if (pair := context.pair()) is None:
        return
    sizes = [engine.settings.block_size for engine in pair]
    if sizes[0] != sizes[1]:
        message = f"prefill has blocks of {sizes[0]} tokens, decode of {sizes[1]}"
        yield Found(differing_place(*pair, "block_size"), message)


@rule(
    "PD307",
    "warning",
    fix="Choose sizes of which one divides the other.",
    source=(
        "NIXL 1.5.1 between two H200s: 64 KiB pieces move at 10.4 GB/s where 8 MiB pieces move at "
        "296 GB/s (measured)."
    ),
)
def tp_sizes_cross(context: Context) -> Iterator[Found]:
    """The tensor-parallel sizes of prefill and decode do not divide each other.

    Every decode rank then reads pieces of several prefill ranks, with a transfer and a lease for
    each: more and smaller reads.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = pair[0].tp_size, pair[1].tp_size
    if prefill % decode and decode % prefill:
        message = (
            f"prefill has {prefill} ranks an engine, decode {decode}: each decode rank reads from "
            "several prefill ranks"
        )
        yield Found(differing_place(*pair, "tensor_parallel_size"), message)


@rule(
    "PD308",
    "warning",
    fix="Give decode at least as many ranks an engine as prefill.",
    source="Direction of tensor parallelism in P/D set-ups of vLLM and Dynamo.",
    on_vllm=True,
)
def tp_direction(context: Context) -> Iterator[Found]:
    """Prefill has more ranks an engine than decode.

    Every decode rank pulls from several prefill ranks, and decode, which is bound by memory
    bandwidth, is the narrow side.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = pair[0].tp_size, pair[1].tp_size
    # PD307 speaks of sizes that do not divide each other.
    if prefill > decode and prefill % decode == 0:
        message = f"prefill has {prefill} ranks an engine, decode {decode}"
        yield Found(pair[0].where("tensor_parallel_size"), message)


@rule(
    "PD309",
    "error",
    fix="Set max_model_len once, at the top level.",
    source="The life of a request.",
    needs=("model",),
    on_vllm=True,
)
def lengths_differ(context: Context) -> Iterator[Found]:
    """Prefill accepts longer requests than decode.

    Prefill computes a prompt that decode then refuses: the work is lost and the client gets an
    error late.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = pair
    if (
        prefill.max_model_len
        and decode.max_model_len
        and prefill.max_model_len > decode.max_model_len
    ):
        message = f"prefill takes {prefill.max_model_len} tokens, decode {decode.max_model_len}"
        yield Found(differing_place(prefill, decode, "max_model_len"), message)


@rule(
    "PD310",
    "error",
    fix="Set load_format once, at the top level.",
    source="load_format.",
    on_vllm=True,
)
def load_formats_differ(context: Context) -> Iterator[Found]:
    """Only one side of the pair has real weights.

    KV blocks of random weights mean nothing to the model, and the other way round.
    """
    if (pair := context.pair()) is None:
        return
    formats = [engine.settings.load_format for engine in pair]
    if formats[0] != formats[1]:
        message = f"load_format of prefill is {formats[0]}, of decode {formats[1]}"
        yield Found(differing_place(*pair, "load_format"), message)


@rule(
    "PD311",
    "warning",
    fix="Set device once, at the top level.",
    source="float32 on a CPU and on a GPU add in another order.",
    needs=("gpus",),
    on_vllm=True,
)
def devices_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode run on different kinds of device.

    KV blocks cross between GPU memory and host memory, and both sides round differently: greedy
    answers can differ from those of one engine alone.
    """
    # With the connector nixl it is an error: PD314.
    if (
        (pair := context.pair()) is not None
        and pair[0].device != pair[1].device
        and not context.uses("nixl")
    ):
        message = f"prefill runs on {pair[0].device}, decode on {pair[1].device}"
        yield Found(differing_place(*pair, "device"), message)


@rule(
    "PD313",
    "error",
    fix=(
        "Set enable_cumem_allocator and enable_sleep_mode once, at the top level, or let "
        "kv_transfer.nixl.path be auto."
    ),
    source=(
        "Measured on two H200s: READ from CuMem memory 0.6 GB/s, from cudaMalloc memory 392 GB/s."
    ),
    needs=("gpus", "fabric"),
)
def allocators_differ(context: Context) -> Iterator[Found]:
    """Only one side of the pair allocates its KV cache from CuMem pools, which the path cannot map.

    Without fabric handles NIXL's path and Mooncake move such memory through the host. A pair is as
    slow as its slower side, and the handshake of the faster one gives no hint of it. Mapped memory
    (paths auto and p2p) and files do not care. Expandable segments of one side alone: PD204.
    """
    pair = context.pair()
    if (
        pair is None
        or not context.moves_cumem_slowly
        or any(engine.device != "cuda" for engine in pair)
    ):
        return
    wanted = [bool(engine.cumem_allocator) for engine in pair]
    if wanted[0] != wanted[1]:
        with_cumem = pair[0] if wanted[0] else pair[1]
        yield Found(
            differing_place(*pair, cumem_setting(with_cumem)),
            f"only {with_cumem.role} uses the CuMem allocator",
        )


@rule(
    "PD314",
    "error",
    fix="Set device once, at the top level, or set kv_transfer.connector to file.",
    source="The connector nixl: both of its paths join memory of one kind.",
    needs=("gpus",),
)
def nixl_across_devices(context: Context) -> Iterator[Found]:
    """The connector nixl is to join a GPU and a CPU.

    A rank reads the memory of a peer on the same kind of device alone, by every path: no pair would
    shake hands, and the launch would never be ready.
    """
    pair = context.pair()
    if pair is None or not context.uses("nixl"):
        return
    prefill, decode = pair
    if prefill.device != decode.device:
        message = (
            f"prefill runs on {prefill.device} and decode on {decode.device}, which the connector "
            "nixl does not join"
        )
        yield Found(differing_place(*pair, "device"), message)


def differing_place(prefill: RoleEngines, decode: RoleEngines, name: str) -> str:
    """Return the role's own setting that makes the difference."""
    return decode.where(name) if name in decode.overrides else prefill.where(name)
