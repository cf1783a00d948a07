"""Reads the shape of a model from its config.json, without torch or transformers.

Models that pdlaunch cannot serve are refused here by name, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlaunch.config.model_files.families import Family, supported_families
from pdlaunch.errors import ConfigError, UnsupportedModelError

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_CONFIG_BYTES = 16 * 1024**2
HYBRID = "the model is a hybrid, for which vLLM drops reports of failed loads"
_FULL = "full_attention"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_RECURRENT = (
    *("ssm_cfg", "ssm_state_size", "state_size", "mamba_d_state", "mamba_d_conv"),
    *("linear_num_key_heads", "attn_layer_period"),
)
_RECURRENT_LAYERS = {"linear_attention", "mamba", "recurrent", "conv"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Describes a decoder-only language model with paged attention."""

    architecture: str
    """The first of ``architectures``; empty when the file has none."""
    model_type: str
    """The language model's: ``gemma3_text`` also in the file of a multimodal ``gemma3``."""
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]
    """Tokens that each layer's attention sees, the current one included; None for all."""
    dtype: str | None
    """The checkpoint's, such as ``bfloat16``; None when the file does not say."""
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    """The ids in generation_config.json, then those in config.json."""
    num_parameters: int
    """Parameters of the language model, exactly as transformers counts them."""
    num_experts: int = 0
    """Experts of each layer; 0 for none."""
    num_idle_parameters: int = 0
    """Parameters of the experts that a token does not go through."""


def read_model_shape(model_dir: str | Path) -> ModelShape:
    """Read ``config.json`` (and ``generation_config.json``) of a directory in Hugging Face layout.

    Raises ConfigError when the file is missing or broken, UnsupportedModelError when the model
    cannot be served.
    """
    directory = Path(model_dir)
    outer = _read_json(directory / "config.json")
    # A multimodal file says some things outside, others only in its text_config.
    _refuse_unsupported(outer)
    config = _language_model(outer)
    _refuse_unsupported(config)
    model_type = str(config.get("model_type"))
    families = supported_families()
    if model_type not in families:
        raise UnsupportedModelError(
            f"model_type {config.get('model_type')!r} is not supported",
            field="model",
            value=config.get("model_type"),
            fix=f"Supported are {', '.join(sorted([*families, 'gemma3']))}.",
        )
    return _shape(outer, config, families[model_type], read_generation_config(directory))


def unproven_layers(model_dir: str | Path) -> str:
    """Return why pdlaunch's connector for vLLM refuses a model whose shape is not known here.

    Empty: nothing in its config.json speaks against it. Raises ConfigError.
    """
    outer = _read_json(Path(model_dir) / "config.json")
    inner = outer.get("text_config")
    for config in (outer, inner if isinstance(inner, dict) else {}):
        if config.get("kv_lora_rank"):
            return "the model has multi-head latent attention, whose KV has no heads"
        layer_types = config.get("layer_types")
        is_mixed = isinstance(layer_types, list) and set(map(str, layer_types)) != {_FULL}
        slides = config.get("sliding_window") and config.get("use_sliding_window") is not False
        if is_mixed or slides or config.get("attention_chunk_size"):
            return HYBRID
        if _has_recurrent_layers(config):
            return HYBRID
    return ""


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return what ``generation_config.json`` says; nothing where there is none.

    Raises ConfigError when the file is broken.
    """
    path = directory / "generation_config.json"
    return _read_json(path) if path.is_file() else {}


def _shape(
    outer: dict[str, Any], config: dict[str, Any], family: Family, generation: dict[str, Any]
) -> ModelShape:
    config = dict(family.defaults) | config
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise _wrong(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    architectures = outer.get("architectures") or config.get("architectures") or [""]
    sizes = {
        "num_layers": _positive(config, "num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": _positive(config, "head_dim", hidden_size // num_heads),
        "hidden_size": hidden_size,
        "intermediate_size": _positive(config, "intermediate_size"),
        "vocab_size": _positive(config, "vocab_size"),
    }
    return ModelShape(
        **sizes,
        architecture=str(architectures[0]),
        model_type=str(config["model_type"]),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        layer_windows=_windows(config, family),
        dtype=_dtype(outer) or _dtype(config),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        # The inner ids may be the family's defaults; what the outer file states is the model's.
        eos_token_ids=_end_tokens(generation, outer if "eos_token_id" in outer else config),
        num_parameters=_count_parameters(config, family, sizes),
        num_experts=_positive(config, "num_local_experts") if family.has_experts else 0,
        num_idle_parameters=_count_idle_parameters(config, sizes) if family.has_experts else 0,
    )


def _windows(config: dict[str, Any], family: Family) -> tuple[int | None, ...]:
    try:
        windows = family.layer_windows(config)
    except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise _wrong(f"layer_types or sliding_window cannot be read ({error})") from None
    # A window includes the current token, so it is at least 1.
    for window in windows:
        if window is not None:
            _positive({"sliding_window": window}, "sliding_window")
    return windows


def _count_parameters(config: dict[str, Any], family: Family, sizes: Mapping[str, int]) -> int:
    hidden_size, inner, head_dim = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "head_dim")
    )
    query_size, kv_size = (
        sizes[name] * head_dim for name in ("num_attention_heads", "num_kv_heads")
    )
    # Queries and output, keys and values; then norms, biases and the inner layer.
    layer = 2 * hidden_size * query_size + 2 * hidden_size * kv_size
    layer += family.norms_per_layer * hidden_size + (2 * head_dim if family.qk_norm else 0)
    if family.qkv_bias or _reads(config, family, "attention_bias"):
        layer += query_size + 2 * kv_size
    if _reads(config, family, "attention_bias"):
        layer += hidden_size
    if _reads(config, family, "mlp_bias"):
        layer += 2 * inner + hidden_size
    layer += sizes["num_attention_heads"] if family.has_sinks else 0
    if family.has_experts:
        router = hidden_size + 1
        layer += _positive(config, "num_local_experts") * (_expert_parameters(sizes) + router)
    else:
        layer += 3 * hidden_size * inner
    # A tied output layer is the embedding itself.
    embeddings = sizes["vocab_size"] * hidden_size * (1 if config["tie_word_embeddings"] else 2)
    return sizes["num_layers"] * layer + embeddings + hidden_size


def _count_idle_parameters(config: dict[str, Any], sizes: Mapping[str, int]) -> int:
    num_experts = _positive(config, "num_local_experts")
    num_used = _positive(config, "num_experts_per_tok")
    if num_used > num_experts:
        raise _wrong(f"num_experts_per_tok {num_used} is over num_local_experts {num_experts}")
    return sizes["num_layers"] * (num_experts - num_used) * _expert_parameters(sizes)


def _expert_parameters(sizes: Mapping[str, int]) -> int:
    """Return the parameters of one expert, without its router."""
    hidden_size, inner = sizes["hidden_size"], sizes["intermediate_size"]
    return 3 * hidden_size * inner + 2 * inner + hidden_size


def _reads(config: dict[str, Any], family: Family, key: str) -> bool:
    return key in family.defaults and bool(config[key])


def _language_model(outer: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the file that describes the language model."""
    if outer.get("model_type") == "gemma3" and isinstance(outer.get("text_config"), dict):
        text_config: dict[str, Any] = outer["text_config"]
        return {"model_type": "gemma3_text"} | text_config
    return outer


def _refuse_unsupported(config: dict[str, Any]) -> None:
    reasons = {
        "encoder-decoder models have a cross-attention cache": config.get("is_encoder_decoder"),
        "multi-head latent attention (MLA, kv_lora_rank) has no KV heads to page": config.get(
            "kv_lora_rank"
        ),
        "Mamba and other state-space or linear-attention layers keep a state, not KV blocks": (
            _has_recurrent_layers(config)
        ),
        "mixture of experts (MoE) is only supported in gpt_oss": (
            config.get("model_type") != "gpt_oss" and any(map(config.get, _EXPERTS))
        ),
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
    for reason, found in reasons.items():
        if found:
            model_type = config.get("model_type")
            message = f"model_type {model_type!r} cannot be served: {reason}"
            raise UnsupportedModelError(message, field="model", value=model_type)


def _has_recurrent_layers(config: dict[str, Any]) -> bool:
    layer_types = config.get("layer_types")
    types = {str(kind) for kind in layer_types} if isinstance(layer_types, list) else set()
    return (
        "mamba" in str(config.get("model_type"))
        or any(map(config.get, _RECURRENT))
        or bool(_RECURRENT_LAYERS & types)
    )


def _has_moving_rope(config: dict[str, Any]) -> bool:
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    settings = [item for item in found if isinstance(item, dict)]
    settings += [
        nested for item in settings for nested in item.values() if isinstance(nested, dict)
    ]
    return any(
        item.get("rope_type", item.get("type")) in ("dynamic", "longrope", "su")
        for item in settings
    )


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    # True is an int to Python, and JSON may hold one by mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _wrong(f"{key} must be a positive integer, found {value!r}")
    return value


def _wrong(message: str) -> ConfigError:
    fix = "Correct config.json of the model."
    return ConfigError(f"config.json: {message}", field="model", fix=fix)


def _dtype(config: dict[str, Any]) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _end_tokens(*configs: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids of all files in order, each once."""
    found: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int):
                found[token_id] = None
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any]:
    fix = f"Correct {path.name} of the model."
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, OSError):
            fix = "Name a directory in Hugging Face layout: config.json, tokenizer.json, "
            fix += "*.safetensors."
        message = f"{path} cannot be read: {error}"
        raise ConfigError(message, field="model", value=str(path.parent), fix=fix) from None
    return content
