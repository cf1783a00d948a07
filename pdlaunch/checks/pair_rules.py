"""Rules PD3xx judge what must be equal, or fit, between engines: most, a prefill and a decode one.

vLLM sees these at the first request, when both engines are already "healthy".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.model_files.shape import ModelShape, read_generation_config
from pdlaunch.errors import ConfigError
from pdlaunch.resolve.role_engines import RoleEngines

_SAMPLING_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "max_new_tokens"),
)
_LAYOUT = "pdlaunch's KV layout and handshake."


@rule(
    "PD301",
    "error",
    fix="Set model once, at the top level.",
    source=_LAYOUT,
    needs=("model",),
)
def models_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode serve models of different shapes.

    The numbers in KV blocks have a meaning to one model only.
    """
    for prefill, decode in _shapes(context):
        names = (
            "architecture",
            "model_type",
            "num_layers",
            "num_attention_heads",
            "hidden_size",
            "vocab_size",
            "num_parameters",
        )
        if differing := _differing(prefill, decode, names):
            yield Found("decode.model", f"prefill and decode differ in {differing}")


@rule(
    "PD302",
    "warning",
    fix="Set model once, at the top level.",
    source=_LAYOUT,
    needs=("model",),
)
def model_paths_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode load their model from different folders.

    The shapes are equal, but a fine-tuned or newer revision has other weights: the handshake
    compares the weights and refuses the pair, after both engines have loaded them.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = pair
    same_shape = prefill.shape == decode.shape
    if (
        same_shape
        and prefill.model.path
        and decode.model.path
        and not _same_folder(prefill.model.path, decode.model.path)
    ):
        yield Found(
            "decode.model", f"prefill serves {prefill.model.path}, decode {decode.model.path}"
        )


@rule(
    "PD316",
    "error",
    fix="Set model and load_format once, at the top level.",
    source="The router: requests go to either, and a stream whose engine dies to the other.",
    needs=("model",),
)
def both_roles_differ(context: Context) -> Iterator[Found]:
    """Engines of both roles serve another model than the pair beside them.

    The router takes one for the other: an answer would come from either model, and one that goes on
    elsewhere from two.
    """
    both = context.engines.get("both")
    for other in context.peers() if both is not None else ():
        assert both is not None
        formats = [engine.settings.load_format for engine in (other, both)]
        paths = [engine.model.path for engine in (other, both)]
        if formats[0] != formats[1]:
            message = f"load_format of {other.role} is {formats[0]}, of both {formats[1]}"
            yield Found(_differing_place(other, both, "load_format"), message)
        elif other.shape != both.shape:
            message = f"{other.role} and both serve models of different shapes"
            yield Found(_differing_place(other, both, "model"), message)
        elif paths[0] and paths[1] and not _same_folder(paths[0], paths[1]):
            message = f"{other.role} serves {paths[0]}, both {paths[1]}"
            yield Found(_differing_place(other, both, "model"), message)


@rule(
    "PD303",
    "error",
    fix="Set dtype once, at the top level.",
    source=_LAYOUT,
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
        yield Found(_differing_place(prefill, decode, "dtype"), message)


@rule(
    "PD304",
    "error",
    fix="Set block_size once, at the top level.",
    source=_LAYOUT,
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
        yield Found(_differing_place(*pair, "block_size"), message)


@rule(
    "PD305",
    "error",
    fix="Serve the same model on both sides.",
    source=_LAYOUT,
    needs=("model",),
)
def groups_differ(context: Context) -> Iterator[Found]:
    """The layers of prefill and decode form different KV cache groups.

    A block holds the layers of one group: with other windows a block of one side has no counterpart
    on the other.
    """
    for prefill, decode in _shapes(context):
        # PD301 speaks of models with another number of layers.
        if (
            prefill.num_layers == decode.num_layers
            and prefill.layer_windows != decode.layer_windows
        ):
            windows = [
                sorted({str(window) for window in shape.layer_windows})
                for shape in (prefill, decode)
            ]
            message = (
                f"layer windows of prefill are {', '.join(windows[0])}, of decode "
                f"{', '.join(windows[1])}"
            )
            yield Found("decode.model", f"{message}, or are given to other layers")


@rule(
    "PD306",
    "error",
    fix="Serve the same model on both sides.",
    source=_LAYOUT,
    needs=("model",),
)
def kv_heads_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode have different KV heads.

    Each head's share of a block is one region; another number or size of heads is another layout.
    """
    for prefill, decode in _shapes(context):
        if differing := _differing(prefill, decode, ("num_kv_heads", "head_dim")):
            yield Found("decode.model", f"prefill and decode differ in {differing}")


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
        yield Found(pair[1].where("tensor_parallel_size"), message)


@rule(
    "PD308",
    "warning",
    fix="Give decode at least as many ranks an engine as prefill.",
    source="Direction of tensor parallelism in P/D set-ups of vLLM and Dynamo.",
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
        yield Found(_differing_place(prefill, decode, "max_model_len"), message)


@rule(
    "PD310",
    "error",
    fix="Set load_format once, at the top level.",
    source="load_format.",
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
        yield Found(_differing_place(*pair, "load_format"), message)


@rule(
    "PD311",
    "warning",
    fix="Set device once, at the top level.",
    source="float32 on a CPU and on a GPU add in another order.",
    needs=("gpus",),
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
        yield Found(_differing_place(*pair, "device"), message)


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
        with_cumem = pair[0].role if wanted[0] else pair[1].role
        yield Found(
            _differing_place(*pair, "enable_cumem_allocator"),
            f"only {with_cumem} uses the CuMem allocator",
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
        yield Found(_differing_place(*pair, "device"), message)


@rule(
    "PD315",
    "warning",
    fix=(
        "Give both models the same generation_config.json. Where they differ in sampling defaults "
        "alone, generation_config: vllm leaves these out."
    ),
    source="Prefill draws the first token of an answer, decode all others.",
    needs=("model",),
)
def generation_defaults_differ(context: Context) -> Iterator[Found]:
    """The generation_config.json of prefill and decode differ.

    The first token of an answer is drawn with the sampling defaults of prefill, all others with
    those of decode; so are the tokens judged that end it.
    """
    for prefill, decode in _shapes(context):
        names = ["eos_token_id"] if prefill.eos_token_ids != decode.eos_token_ids else []
        if context.config.generation_config == "auto":
            ours, theirs = (_sampling_defaults(engine) for engine in context.pair() or ())
            names += [name for name in _SAMPLING_DEFAULTS if ours.get(name) != theirs.get(name)]
        if names:
            message = f"generation_config.json of prefill and decode differ in {', '.join(names)}"
            yield Found("decode.model", message)


def _sampling_defaults(engine: RoleEngines) -> dict[str, Any]:
    """Return what the file says; nothing where it cannot be read, which other rules report."""
    try:
        return read_generation_config(Path(engine.model.path)) if engine.model.path else {}
    except ConfigError:
        return {}


def _shapes(context: Context) -> Iterator[tuple[ModelShape, ModelShape]]:
    pair = context.pair()
    if pair is not None and pair[0].shape is not None and pair[1].shape is not None:
        yield pair[0].shape, pair[1].shape


def _differing(prefill: ModelShape, decode: ModelShape, names: tuple[str, ...]) -> str:
    """Return ``num_layers (30, 32), vocab_size (...)``; empty when all are equal."""
    values = ((name, getattr(prefill, name), getattr(decode, name)) for name in names)
    return ", ".join(f"{name} ({left}, {right})" for name, left, right in values if left != right)


def _differing_place(prefill: RoleEngines, decode: RoleEngines, name: str) -> str:
    """Return the role's own setting that makes the difference."""
    return decode.where(name) if name in decode.overrides else prefill.where(name)


def _same_folder(left: str, right: str) -> bool:
    return Path(left).resolve() == Path(right).resolve()
