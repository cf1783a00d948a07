"""Reads the shape of a model from its config.json, without torch or transformers.

Models that native engines cannot serve are refused here, before weights are read. transformers
writes only fields that differ from a family's defaults; ``FAMILIES`` has these defaults. Source:
configuration classes of transformers 5, compared in ``tests/config/model_files/test_shape.py``.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pdlaunch.config.model_files.outline import Outline, outline_of
from pdlaunch.config.roles import HOW_TO_GET_VLLM
from pdlaunch.errors import ConfigError, UnsupportedModelError

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_CONFIG_BYTES = 16 * 1024**2
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"

Config = dict[str, Any]
Windows = tuple[int | None, ...]
Shapes = dict[str, tuple[int, ...]]

OUTPUT_LAYER = "lm_head.weight"
_NORMS = tuple(
    f"{name}_layernorm.weight"
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
)

_FULL, _SLIDING = "full_attention", "sliding_attention"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_RECURRENT = (
    *("ssm_cfg", "ssm_state_size", "state_size", "mamba_d_state", "mamba_d_conv"),
    *("linear_num_key_heads", "attn_layer_period"),
)
_RECURRENT_LAYERS = {"linear_attention", "mamba", "recurrent", "conv"}


@dataclass(frozen=True, slots=True)
class Family:
    """Describes the models of one ``model_type``."""

    # Defaults of the fields in ``_SIZES``. None: num_key_value_heads defaults to
    # num_attention_heads, and head_dim to hidden_size // num_attention_heads.
    sizes: tuple[int | None, ...]
    # Defaults of other fields. A field for a bias is read only if it has a default here.
    others: Config = field(default_factory=dict)
    # True for a layer with a sliding window, if the file has no layer_types. None: full attention.
    slides: Callable[[Config, int], bool] | None = None
    has_one_window: bool = False  # The model gives all layers one window and ignores layer_types
    # Query, key and value projections always have a bias (no ``attention_bias`` field)
    qkv_bias: bool = False
    # Queries and keys are normalised, with one weight for each head dimension
    qk_norm: bool = False
    norms_per_layer: int = 2

    @property
    def defaults(self) -> Config:
        sizes = dict(zip(_SIZES, self.sizes, strict=True))
        return {"tie_word_embeddings": False, "eos_token_id": None, **sizes, **self.others}


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def _slides_without_rope(config: Config, layer: int) -> bool:
    interval = config["no_rope_layer_interval"]
    has_rope = config["no_rope_layers"]
    return not (has_rope[layer] if has_rope else (layer + 1) % interval)


FAMILIES: Mapping[str, Family] = {
    "llama": Family((32000, 4096, 11008, 32, 32, None, None, 2048), {"eos_token_id": 2, **_BIASES}),
    "qwen2": Family(
        (151936, 4096, 22016, 32, 32, 32, None, 32768),
        _QWEN,
        slides=lambda config, layer: layer >= config["max_window_layers"],
        qkv_bias=True,
    ),
    "qwen3": Family(
        (151936, 4096, 22016, 32, 32, 32, 128, 32768),
        {"attention_bias": False, **_QWEN},
        slides=lambda config, layer: layer >= config["max_window_layers"],
        qk_norm=True,
    ),
    "mistral": Family(
        (32000, 4096, 14336, 32, 32, 8, None, 131072),
        {"eos_token_id": 2, "sliding_window": 4096},
        slides=lambda _config, _layer: True,
        has_one_window=True,
    ),
    "gemma3_text": Family(
        (262208, 2304, 9216, 26, 8, 4, 256, 131072),
        {
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        slides=lambda config, layer: bool((layer + 1) % config["sliding_window_pattern"]),
        qk_norm=True,
        norms_per_layer=4,
    ),
    "smollm3": Family(
        (128256, 2048, 11008, 36, 16, 4, None, 32768),
        {
            "tie_word_embeddings": True,
            "eos_token_id": 128001,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            **_BIASES,
        },
        slides=_slides_without_rope,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Describes a decoder-only language model with paged attention."""

    architecture: str  # The first of ``architectures``; empty when the file has none
    # The type of the language model: ``gemma3_text`` also for a multimodal ``gemma3``
    model_type: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    # Tokens that the attention of each layer covers, with the current token; None for all tokens
    layer_windows: Windows
    dtype: str | None  # The checkpoint's dtype, such as ``bfloat16``; None if the file has none
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]  # The ids in generation_config.json, then those in config.json
    # Shapes of the weights by name: in each layer (``mlp.up_proj.weight``), and outside of layers
    layer_weights: Shapes
    other_weights: Shapes
    is_latent: bool = False  # Multi-head latent attention (MLA): each rank keeps the only KV head
    # Set for a model that native engines cannot serve; then only the attention sizes above hold
    outline: Outline | None = None

    @property
    def is_outline(self) -> bool:
        return self.outline is not None

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, exactly as transformers counts them."""
        # A footprint that is 5 % too large refuses models that fit.
        in_layer = sum(map(math.prod, self.layer_weights.values()))
        return self.num_layers * in_layer + sum(map(math.prod, self.other_weights.values()))


def read_model_shape(model_dir: str | Path) -> ModelShape:
    """Read a model's shape from ``config.json`` and ``generation_config.json``. Raises ConfigError,
    or UnsupportedModelError if native engines cannot serve the model.
    """
    directory = Path(model_dir)
    outer = read_json(directory / "config.json")
    # A multimodal model has some fields at the top level, and others only in text_config.
    config = outer
    if outer.get("model_type") == "gemma3" and isinstance(outer.get("text_config"), dict):
        config = {"model_type": "gemma3_text", **outer["text_config"]}
    for each in (outer, config):
        if reason := _unsupported_because(each):
            kind = each.get("model_type")
            message = f"model_type {kind!r} cannot be served by native engines: {reason}"
            raise UnsupportedModelError(message, field="model", value=kind, fix=_USE_VLLM)
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        message = f"model_type {kind!r} is not supported by native engines"
        fix = f"{_USE_VLLM} Native engines serve {', '.join(sorted([*FAMILIES, 'gemma3']))}."
        raise UnsupportedModelError(message, field="model", value=kind, fix=fix)
    return _shape(outer, family.defaults | config, family, read_generation_config(directory))


_USE_VLLM = f"Serve it with vLLM: {HOW_TO_GET_VLLM}."

# Defaults for models that native engines cannot serve
_ANY = Family(
    (1, None, 1, None, None, None, None, None),
    {"use_sliding_window": True, "sliding_window": None},
    slides=lambda _config, _layer: True,
)


def read_outline(directory: Path, weight_bytes: int | None = None) -> ModelShape | None:
    """Return shape and outline of a model that only vLLM serves; None if it is not understood.
    ``weight_bytes``: the size of the weights if the directory has none.
    """
    outer = read_json(directory / "config.json")
    inner = outer.get("text_config")
    told = outer | (inner if isinstance(inner, dict) else {})
    family = FAMILIES.get(str(told.get("model_type")), _ANY)
    told = {key: value for key, value in family.defaults.items() if value is not None} | told
    try:
        if (index := directory / INDEX).is_file():
            weight_bytes = int(read_json(index)["metadata"]["total_size"]) or weight_bytes
        else:
            num_bytes = sum(file.stat().st_size for file in directory.glob(WEIGHTS))
            weight_bytes = num_bytes or weight_bytes
        outline = outline_of(told, weight_bytes)
        latent = told.get("kv_lora_rank")
        # Leave out windows: the outline describes the KV of each layer.
        config = _ANY.defaults | told | {"layer_types": None, "sliding_window": None}
        shape = _shape(outer, config | ({"num_key_value_heads": 1} if latent else {}), _ANY, {})
    except (ConfigError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    return replace(shape, is_latent=bool(latent), outline=outline)


def keeps_state(directory: Path) -> bool:
    """Return True if some layers keep a state instead of KV blocks, as Mamba does."""
    outer = read_json(directory / "config.json")
    inner = outer.get("text_config")
    return any(_is_recurrent(each) for each in (outer, inner) if isinstance(each, dict))


def read_generation_config(directory: Path) -> Config:
    """Return the fields of ``generation_config.json``, if there is one. Raises ConfigError."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> Config:
    """Read the object in a JSON file of a model. Raises ConfigError."""
    try:
        # Refuse a link to a device, which may be endless.
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes} bytes")
        content = json.loads(text.decode())
        if not isinstance(content, dict):
            raise TypeError("it is not a JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        files = "config.json, tokenizer.json, *.safetensors"
        layout = f"Name a directory in Hugging Face layout: {files}."
        fix = layout if isinstance(error, OSError) else f"Correct {path.name} of the model."
        message = f"{path} cannot be read: {error}"
        raise ConfigError(message, field="model", value=str(path.parent), fix=fix) from None
    return content


def _shape(outer: Config, config: Config, family: Family, generation: Config) -> ModelShape:
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        heads = f"num_attention_heads {num_heads}"
        raise _wrong(f"num_key_value_heads {num_kv_heads} does not divide {heads}")
    num_layers = _positive(config, "num_hidden_layers")
    inner = _positive(config, "intermediate_size")
    head_dim = _positive(config, "head_dim", hidden_size // num_heads)
    vocab_size = _positive(config, "vocab_size")
    architectures = outer.get("architectures") or config.get("architectures") or [""]

    query_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    has_attention_bias = "attention_bias" in family.others and bool(config["attention_bias"])
    has_mlp_bias = "mlp_bias" in family.others and bool(config["mlp_bias"])
    has_qkv_bias = family.qkv_bias or has_attention_bias
    layer: Shapes = dict.fromkeys(_NORMS[: family.norms_per_layer], (hidden_size,))
    if family.qk_norm:
        layer |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (head_dim,))
    for name, rows, columns, has_bias in (
        ("self_attn.q_proj", query_size, hidden_size, has_qkv_bias),
        ("self_attn.k_proj", kv_size, hidden_size, has_qkv_bias),
        ("self_attn.v_proj", kv_size, hidden_size, has_qkv_bias),
        ("self_attn.o_proj", hidden_size, query_size, has_attention_bias),
        ("mlp.gate_proj", inner, hidden_size, has_mlp_bias),
        ("mlp.up_proj", inner, hidden_size, has_mlp_bias),
        ("mlp.down_proj", hidden_size, inner, has_mlp_bias),
    ):
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    others: Shapes = {
        "model.embed_tokens.weight": (vocab_size, hidden_size),
        "model.norm.weight": (hidden_size,),
    }
    # A tied output layer is the embedding itself.
    if not config["tie_word_embeddings"]:
        others |= {OUTPUT_LAYER: (vocab_size, hidden_size)}

    return ModelShape(
        architecture=str(architectures[0]),
        model_type=str(config["model_type"]),
        num_layers=num_layers,
        num_attention_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=inner,
        vocab_size=vocab_size,
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        layer_windows=_windows(config, family, num_layers),
        dtype=_dtype(outer) or _dtype(config),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        # Ids at the top level come first: those in text_config may be defaults of the family.
        eos_token_ids=_end_tokens(generation, outer if "eos_token_id" in outer else config),
        layer_weights=layer,
        other_weights=others,
    )


def _windows(config: Config, family: Family, num_layers: int) -> Windows:
    """Return the window of each layer, from layer_types or else from the family's rule."""
    if family.slides is None:
        return (None,) * num_layers
    # A family without the field use_sliding_window always uses a window that is given.
    has_switch = "use_sliding_window" in family.others
    is_off = config["sliding_window"] is None or (has_switch and not config["use_sliding_window"])
    window = None if is_off else _positive(config, "sliding_window")
    types = config.get("layer_types")
    try:
        if types is None:
            # Gemma 3 has neither the switch nor one window for all layers, so it needs a window.
            is_full = is_off and (has_switch or family.has_one_window)
            slides = [not is_full and family.slides(config, layer) for layer in range(num_layers)]
            types = [_SLIDING if each else _FULL for each in slides]
        unknown = set(types) - {_FULL, _SLIDING}
        is_short = len(types) != num_layers
    except (TypeError, IndexError, ZeroDivisionError) as error:
        raise _wrong(f"layer_types or sliding_window cannot be read ({error})") from None
    if unknown:
        reason = f"layers of type {min(unknown, key=str)!r} cannot be served: only full and "
        reason += "sliding-window attention keep a paged KV cache here"
    elif is_short:
        reason = f"layer_types names {len(types)} layers, but num_hidden_layers is {num_layers}"
    elif window is None and _SLIDING in types:
        reason = (
            "layer_types has sliding_attention, but config.json switches the sliding window off"
        )
    elif family.has_one_window and {*types} != {_FULL if window is None else _SLIDING}:
        reason = "layer_types does not fit the model, which gives all layers one window"
    else:
        return tuple(window if each == _SLIDING else None for each in types)
    fix = _USE_VLLM if unknown else "Correct config.json of the model."
    raise UnsupportedModelError(reason, field="model", value=config["model_type"], fix=fix)


def _unsupported_because(config: Config) -> str:
    reasons = {
        "encoder-decoder models have a cross-attention cache": config.get("is_encoder_decoder"),
        "multi-head latent attention (MLA, kv_lora_rank) has no KV heads to page": config.get(
            "kv_lora_rank"
        ),
        "Mamba and other state-space or linear-attention layers keep a state, not KV blocks": (
            _is_recurrent(config)
        ),
        "mixture of experts (MoE) is not supported": any(map(config.get, _EXPERTS)),
        "quantized checkpoints (quantization_config) are not supported; a .gguf file is "
        "dequantized": config.get("quantization_config"),
        "attention logit soft-capping (attn_logit_softcapping) is not supported": config.get(
            "attn_logit_softcapping"
        ),
        "bidirectional attention (use_bidirectional_attention) cannot be cached": config.get(
            "use_bidirectional_attention"
        ),
        "rotary embedding whose frequencies depend on the length of the batch (rope_type dynamic, "
        "longrope)": _has_moving_rope(config),
    }
    return next((reason for reason, found in reasons.items() if found), "")


def _is_recurrent(config: Config) -> bool:
    types = config.get("layer_types")
    return (
        "mamba" in str(config.get("model_type"))
        or any(map(config.get, _RECURRENT))
        or (isinstance(types, list) and not _RECURRENT_LAYERS.isdisjoint(map(str, types)))
    )


def _has_moving_rope(config: Config) -> bool:
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    settings = [each for each in found if isinstance(each, dict)]
    # Gemma 3 nests settings for each kind of layer.
    settings += [it for each in settings for it in each.values() if isinstance(it, dict)]
    kinds = [each.get("rope_type", each.get("type")) for each in settings]
    return any(kind in ("dynamic", "longrope", "su") for kind in kinds)


def _positive(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    # Refuse booleans, which are instances of int in Python.
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _wrong(f"{key} must be a positive integer, found {value!r}")
    return value


def _wrong(message: str) -> ConfigError:
    fix = "Correct config.json of the model."
    return ConfigError(f"config.json: {message}", field="model", fix=fix)


def _dtype(config: Config) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _end_tokens(*configs: Config) -> tuple[int, ...]:
    values = [config.get("eos_token_id") for config in configs]
    listed = [value if isinstance(value, list) else [value] for value in values]
    return tuple(dict.fromkeys(each for ids in listed for each in ids if isinstance(each, int)))
