"""Rules PD30x and PD31x about models: what engines that share requests must serve alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdlaunch.checks.context import Context
from pdlaunch.checks.pair_rules import KV_LAYOUT, differing_place
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.model_files.shape import ModelShape, read_generation_config
from pdlaunch.errors import ConfigError
from pdlaunch.planning.role_engines import RoleEngines

_SAMPLING_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "max_new_tokens"),
)


@rule(
    "PD301",
    "error",
    fix="Set model once, at the top level.",
    source=KV_LAYOUT,
    needs=("model",),
    on_vllm=True,
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
            yield Found(_place(context), f"prefill and decode differ in {differing}")


@rule(
    "PD302",
    "warning",
    fix="Set model once, at the top level.",
    source=KV_LAYOUT,
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
        message = f"prefill serves {prefill.model.path}, decode {decode.model.path}"
        yield Found(_place(context), message)


@rule(
    "PD316",
    "error",
    fix="Set model and load_format once, at the top level.",
    source="The router: requests go to either, and a stream whose engine dies to the other.",
    needs=("model",),
    on_vllm=True,
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
            yield Found(differing_place(other, both, "load_format"), message)
        elif other.shape != both.shape:
            message = f"{other.role} and both serve models of different shapes"
            yield Found(differing_place(other, both, "model"), message)
        elif paths[0] and paths[1] and not _same_folder(paths[0], paths[1]):
            message = f"{other.role} serves {paths[0]}, both {paths[1]}"
            yield Found(differing_place(other, both, "model"), message)


@rule(
    "PD305",
    "error",
    fix="Serve the same model on both sides.",
    source=KV_LAYOUT,
    needs=("model",),
    on_vllm=True,
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
            yield Found(_place(context), f"{message}, or are given to other layers")


@rule(
    "PD306",
    "error",
    fix="Serve the same model on both sides.",
    source=KV_LAYOUT,
    needs=("model",),
    on_vllm=True,
)
def kv_heads_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode have different KV heads.

    Each head's share of a block is one region; another number or size of heads is another layout.
    """
    for prefill, decode in _shapes(context):
        if differing := _differing(prefill, decode, ("num_kv_heads", "head_dim")):
            yield Found(_place(context), f"prefill and decode differ in {differing}")


@rule(
    "PD315",
    "warning",
    fix=(
        "Give both models the same generation_config.json. Where they differ in sampling defaults "
        "alone, generation_config: vllm leaves these out."
    ),
    source="Prefill draws the first token of an answer, decode all others.",
    needs=("model",),
    on_vllm=True,
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
            yield Found(_place(context), message)


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


def _place(context: Context) -> str:
    """Return the setting by which the models of the pair differ."""
    pair = context.pair()
    assert pair is not None, "there is no difference without it"
    return differing_place(*pair, "model")


def _differing(prefill: ModelShape, decode: ModelShape, names: tuple[str, ...]) -> str:
    """Return ``num_layers (30, 32), vocab_size (...)``; empty when all are equal."""
    values = ((name, getattr(prefill, name), getattr(decode, name)) for name in names)
    return ", ".join(f"{name} ({left}, {right})" for name, left, right in values if left != right)


def _same_folder(left: str, right: str) -> bool:
    return Path(left).resolve() == Path(right).resolve()
