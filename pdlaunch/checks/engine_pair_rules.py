"""Rules PD62x judge what must be equal, or fit, between a prefill and a decode engine of vLLM.

vLLM compares most of it in the handshake of the first request, when both are healthy; what fails
there is computed by decode itself, without a word to the client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from pdlaunch.checks.context import Context
from pdlaunch.checks.other_engines import by_name, place, vllm_pair
from pdlaunch.checks.pair_rules import differing_place
from pdlaunch.checks.rule import Found, rule
from pdlaunch.machine.allocator_conf import read_allocator_conf
from pdlaunch.planning.vllm_verification import AWAITS_AGENT
from pdlaunch.vllm.support import SUPPORTED_VERSIONS

_HANDSHAKE = "vLLM 0.32: compute_nixl_compatibility_hash, _validate_remote_agent_handshake."
_SPECULATIVE = ("speculative-config", "spec-method", "spec-model", "spec-tokens")
_LORA = (
    "enable-lora",
    "lora-modules",
    "max-lora-rank",
    "lora-dtype",
    "lora-target-modules",
    "default-mm-loras",
)
_CACHE = (
    "attention-backend",
    "attention-config",
    "decode-context-parallel-size",
    "disable-hybrid-kv-cache-manager",
    "disable-sliding-window",
    "hf-overrides",
    "kv-cache-dtype-skip-layers",
    "kv-sharing-fast-prefill",
    "mamba-block-size",
    "mamba-cache-dtype",
    "mamba-ssm-cache-dtype",
    "model-impl",
    "quantization",
    "quantization-config",
)


@rule(
    "PD620",
    "error",
    fix="Set model once, at the top level.",
    source=_HANDSHAKE,
)
def model_names_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode of vLLM load their model under different names.

    Its handshake compares the path or name of the model, even where the files are the same.
    """
    if (pair := vllm_pair(context)) is None:
        return
    prefill, decode = (side.model.path or side.settings.model for side in pair)
    if prefill != decode:
        yield Found(differing_place(*pair, "model"), f"prefill loads {prefill}, decode {decode}")


@rule(
    "PD621",
    "error",
    fix="Set kv-cache-dtype once, in engine_args at the top level.",
    source=_HANDSHAKE,
)
def kv_dtypes_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode keep their KV cache in different dtypes.

    Blocks are handed over as bytes: in another dtype they are other numbers.
    """
    yield from _differing(context, ("kv-cache-dtype",))


@rule(
    "PD622",
    "error",
    fix="Set block_size once, at the top level.",
    source=_HANDSHAKE,
)
def block_sizes_differ(context: Context) -> Iterator[Found]:
    """The block sizes of prefill and decode do not fit.

    Decode on a GPU reads blocks that are a part of its own; on a CPU they must be equal. A side
    without block_size takes what vLLM chooses.
    """
    if (pair := vllm_pair(context)) is None:
        return
    prefill, decode = (side.block_size for side in pair)
    fits = (
        all(side.device == "cuda" for side in pair)
        and prefill is not None
        and decode is not None
        and decode % prefill == 0
    )
    if prefill != decode and not fits:
        sizes = [str(size or "what vLLM chooses") for size in (prefill, decode)]
        yield Found(
            differing_place(*pair, "block_size"),
            f"block_size of prefill is {sizes[0]}, of decode {sizes[1]}",
        )


@rule(
    "PD623",
    "error",
    fix="Give both sides the same speculative settings, in engine_args at the top level.",
    source=_HANDSHAKE,
)
def speculative_settings_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode speculate with different settings.

    A drafting model has KV blocks of its own, which decode gets from prefill.
    """
    yield from _differing(context, _SPECULATIVE)


@rule(
    "PD624",
    "error",
    fix="Give both sides the same adapters, in engine_args at the top level.",
    source="A request names its adapter to both engines.",
)
def adapters_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode have different LoRA adapters.

    Both compute layers of a request with the adapter that it names: an engine without it answers
    404, and one with another file of that name computes other numbers.
    """
    yield from _differing(context, _LORA)


@rule(
    "PD625",
    "error",
    fix="Give both sides the same value, in engine_args at the top level.",
    source=_HANDSHAKE,
)
def cache_settings_differ(context: Context) -> Iterator[Found]:
    """A flag that shapes KV blocks differs between prefill and decode.

    Layout, dtype and meaning of the bytes follow from backend, quantization and cache settings.
    """
    yield from _differing(context, _CACHE)


@rule(
    "PD626",
    "error",
    fix=(
        "Choose tensor-parallel sizes of which one divides the other, and no larger one for "
        "prefill than there are KV heads."
    ),
    source=f"{_HANDSHAKE} TransferTopology.tp_ratio.",
)
def tp_sizes_do_not_fit(context: Context) -> Iterator[Found]:
    """The tensor-parallel sizes of prefill and decode do not fit.

    The handshake of vLLM ends with an assertion.
    """
    if (pair := vllm_pair(context)) is None:
        return
    prefill, decode = (side.tp_size for side in pair)
    sizes = f"prefill has {prefill} ranks an engine, decode {decode}"
    heads = pair[0].shape.num_kv_heads if pair[0].shape is not None else None
    if prefill % decode and decode % prefill:
        yield Found(differing_place(*pair, "tensor_parallel_size"), sizes)
    elif prefill > decode and heads is not None and prefill > heads:
        yield Found(
            pair[0].where("tensor_parallel_size"), f"{sizes}, and the model has {heads} KV heads"
        )


@rule(
    "PD627",
    "warning",
    fix="Switch enable_sleep_mode and enable_cumem_allocator off.",
    source="vLLM 0.24 between two H200s: 0.44 GB/s from CuMem pools (measured).",
    needs=("gpus", "fabric"),
)
def cumem_beside_nixl(context: Context) -> Iterator[Found]:
    """vLLM's KV cache lies in CuMem pools, which NIXL moves at 0.44 GB/s here.

    Without fabric handles a peer cannot map such memory, and UCX copies it through the host,
    without an error.
    """
    for engines in vllm_pair(context) or ():
        if engines.device == "cuda" and any(
            gpu.has_fabric_handles is False for gpu in engines.gpus
        ):
            for name in ("enable_sleep_mode", "enable_cumem_allocator"):
                if getattr(engines.settings, name):
                    yield Found(engines.where(name), f"{name} moves the KV cache into CuMem pools")


@rule(
    "PD628",
    "error",
    fix="Remove expandable_segments from the variable.",
    source=(
        "Measured on two H200s with NIXL 1.5.1; vLLM 0.32 looks for expandable_segments:True in "
        "PYTORCH_CUDA_ALLOC_CONF alone."
    ),
)
def expandable_segments(context: Context) -> Iterator[Found]:
    """vLLM's KV cache lies in expandable segments, which NIXL moves at 0.6 GB/s.

    vLLM refuses to start with the one spelling that it looks for; with others it starts and is
    slow. Its CuMem allocator switches the segments off for the KV cache.
    """
    for engines in vllm_pair(context) or ():
        conf = read_allocator_conf(engines.given_environ)
        if (
            engines.device == "cuda"
            and conf.variable
            and conf.expandable_segments
            and not engines.cumem_allocator
        ):
            yield Found(
                context.where_variable(engines, conf.variable),
                f"{conf.variable} switches expandable_segments on",
            )


@rule(
    "PD629",
    "warning",
    fix=f"Have engine_command name a vLLM {', '.join(SUPPORTED_VERSIONS)}; take the argument out "
    "of engine_args; or serve the model with engine: native.",
    source="vLLM 0.32: an expired lease's blocks are reused, and read without an error.",
)
def not_verified(context: Context) -> Iterator[Found]:
    """Engines of vLLM use pulled KV blocks unproven, though kv_transfer.verify is on.

    pdlaunch's connector proves them, for the versions of vLLM and the models that it knows. With
    vLLM's own, a READ that comes after its lease brings another prompt's blocks, and the answer is
    wrong with HTTP 200.
    """
    reason = pair[0].unverified if (pair := vllm_pair(context)) else ""
    is_known = bool(reason) and not reason.endswith(AWAITS_AGENT)
    if is_known and context.config.kv_transfer.verify:
        yield Found("kv_transfer.verify", f"wrong KV blocks would be used unnoticed: {reason}")


def _differing(context: Context, names: tuple[str, ...]) -> Iterator[Found]:
    """Yield the flags of these names that the two sides are not given alike."""
    if (pair := vllm_pair(context)) is None:
        return
    flags = [by_name(context, side) for side in pair]
    given = dict.fromkeys(name for side in flags for name in side)
    for name in given:
        values = [_shown(side, name) for side in flags]
        if name.partition(".")[0] in names and values[0] != values[1]:
            side = pair[1] if _has(flags[1], flags[0], name) else pair[0]
            yield Found(
                place(context, side, name.partition(".")[0]),
                f"--{name} of prefill is {values[0]}, of decode {values[1]}",
            )


def _shown(flags: Mapping[str, JsonValue], name: str) -> str:
    return str(flags[name]) if name in flags else "not given"


def _has(flags: Mapping[str, JsonValue], others: Mapping[str, JsonValue], name: str) -> bool:
    return name in flags or name not in others
