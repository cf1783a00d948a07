"""Lists the model families that pdlaunch serves, with the defaults that config.json leaves out.

transformers writes only what differs from a family's defaults. Source: the configuration classes of
transformers 5; ``tests/config/model_files/test_shape.py`` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pdlaunch.errors import UnsupportedModelError

Config = Mapping[str, Any]
Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Describes the models of one ``model_type``."""

    defaults: Mapping[str, Any]
    """Defaults of the fields that ``shape`` reads; a ``head_dim`` of None is hidden_size //
    heads.
    """
    layer_windows: Callable[[Config], Windows]
    """Returns the window of each layer, given the config with its defaults filled in."""
    qkv_bias: bool = False
    """Query, key and value projections always have a bias (no ``attention_bias`` field)."""
    qk_norm: bool = False
    """Queries and keys are normalised, with one weight for each head dimension."""
    norms_per_layer: int = 2
    has_sinks: bool = False
    """Each query head has an attention sink."""
    has_experts: bool = False
    """A layer has num_local_experts experts with biases, of which a token uses
    num_experts_per_tok, instead of one inner layer.
    """


def _no_windows(config: Config) -> Windows:
    windows: Windows = (None,) * config["num_hidden_layers"]
    return windows


def _windows_of_types(config: Config, layer_types: list[str], window: int | None) -> Windows:
    for unknown in set(layer_types) - {"full_attention", "sliding_attention"}:
        raise _unsupported(
            f"layers of type {unknown!r} cannot be served: only full and sliding-window attention "
            "keep a paged KV cache here",
            value=unknown,
        )
    num_layers = config["num_hidden_layers"]
    if len(layer_types) != num_layers:
        message = f"layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}"
        raise _unsupported(message, fix="Correct config.json of the model.")
    if "sliding_attention" in layer_types and window is None:
        raise _unsupported(
            "layer_types has sliding_attention, but config.json switches the sliding window off",
            fix="Correct config.json: set sliding_window (and use_sliding_window where the family "
            "has it).",
        )
    return tuple(window if each == "sliding_attention" else None for each in layer_types)


def _unsupported(message: str, **details: Any) -> UnsupportedModelError:
    return UnsupportedModelError(message, field="model", **details)


def _qwen_windows(config: Config) -> Windows:
    """Without layer_types, layers from max_window_layers on slide if use_sliding_window is set."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    if config["layer_types"] is not None:
        return _windows_of_types(config, config["layer_types"], window)
    first = config["max_window_layers"]
    return tuple(window if layer >= first else None for layer in range(config["num_hidden_layers"]))


def _mistral_windows(config: Config) -> Windows:
    """Return one window for all layers, as the model does not look at layer_types."""
    windows: Windows = (config["sliding_window"],) * config["num_hidden_layers"]
    layer_types = config.get("layer_types")
    # transformers ignores layer_types here: what they say must not differ from what it runs.
    if layer_types and _windows_of_types(config, layer_types, config["sliding_window"]) != windows:
        raise _unsupported(
            "mistral with layer_types of more than one kind: the mistral model gives all layers "
            "one window",
            fix="Use a model whose config.json has another model_type, or no layer_types.",
        )
    return windows


def _gemma3_windows(config: Config) -> Windows:
    """Without layer_types, every ``sliding_window_pattern``-th layer is full."""
    layer_types = config["layer_types"]
    if layer_types is None:
        pattern = config["sliding_window_pattern"]
        layer_types = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
    return _windows_of_types(config, layer_types, config["sliding_window"])


def _smollm3_windows(config: Config) -> Windows:
    """Without layer_types, layers without rotary embedding slide if use_sliding_window is set."""
    window = config["sliding_window"]
    if config["layer_types"] is not None:
        return _windows_of_types(config, config["layer_types"], window)
    num_layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    has_rope = config["no_rope_layers"] or [
        int((layer + 1) % interval != 0) for layer in range(num_layers)
    ]
    slides = config["use_sliding_window"]
    return tuple(window if slides and not has_rope[layer] else None for layer in range(num_layers))


def _gpt_oss_windows(config: Config) -> Windows:
    """Without layer_types, every other layer slides, the first one among them."""
    layer_types = config["layer_types"]
    if layer_types is None:
        layer_types = [
            ("sliding_attention", "full_attention")[layer % 2]
            for layer in range(config["num_hidden_layers"])
        ]
    return _windows_of_types(config, layer_types, config["sliding_window"])


_COMMON = {"tie_word_embeddings": False, "eos_token_id": None}
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def supported_families() -> dict[str, Family]:
    """Return the families by model_type."""

    def sizes(*values: int | None) -> dict[str, Any]:
        return dict(zip(_FIELDS, values, strict=True)) | _COMMON

    of_text = {"eos_token_id": 2}
    biases = {"attention_bias": False, "mlp_bias": False}
    llama = sizes(32000, 4096, 11008, 32, 32, None, None, 2048) | of_text
    mistral = sizes(32000, 4096, 14336, 32, 32, 8, None, 131072) | of_text
    qwen = sizes(151936, 4096, 22016, 32, 32, 32, None, 32768) | {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
    gemma3 = sizes(262208, 2304, 9216, 26, 8, 4, 256, 131072) | {
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "attention_bias": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
    }
    smollm3 = sizes(128256, 2048, 11008, 36, 16, 4, None, 32768) | {
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
    }
    gpt_oss = sizes(201088, 2880, 2880, 36, 64, 8, 64, 131072) | {
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }
    qwen3 = qwen | {"head_dim": 128, "attention_bias": False}
    return {
        "llama": Family(llama | biases, _no_windows),
        "qwen2": Family(qwen, _qwen_windows, qkv_bias=True),
        "qwen3": Family(qwen3, _qwen_windows, qk_norm=True),
        "mistral": Family(mistral | {"sliding_window": 4096}, _mistral_windows),
        "gemma3_text": Family(gemma3, _gemma3_windows, qk_norm=True, norms_per_layer=4),
        "smollm3": Family(smollm3 | biases, _smollm3_windows),
        "gpt_oss": Family(gpt_oss, _gpt_oss_windows, has_sinks=True, has_experts=True),
    }
