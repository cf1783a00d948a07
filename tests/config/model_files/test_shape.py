"""config.json as pdlaunch reads it, beside transformers' own reading."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pdlaunch.config.model_files.shape import FAMILIES, read_model_shape
from pdlaunch.errors import ConfigError, UnsupportedModelError
from tests.config.model_files.files import all_weights

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "vocab_size": 90,
    "num_hidden_layers": 7,
} | {"pad_token_id": 0}

LAYERS = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biased": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "qwen2": {"num_key_value_heads": 2},
    "qwen2 window": {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen3 layer_types": {
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": LAYERS,
    },
    "mistral window": {"num_key_value_heads": 1, "sliding_window": 33, "dtype": "float16"},
    "gemma3_text": {},
    "gemma3_text pattern": {"sliding_window_pattern": 3, "sliding_window": 20, "head_dim": 8},
    "gemma3 multimodal": {"text_config": {"model_type": "gemma3_text", "head_dim": 8} | SMALL},
    "smollm3 window": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "no_rope_layer_interval": 2,
    },
}
"""What a config.json holds, beside SMALL and the family that a name begins with."""


def write(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def as_transformers_reads(directory: Path) -> dict[str, Any]:
    outer = AutoConfig.from_pretrained(directory)
    config = outer.get_text_config()
    model = AutoModelForCausalLM.from_config(config)
    attentions = [layer.self_attn for layer in model.model.layers]
    windows = [getattr(attention, "sliding_window", None) for attention in attentions]
    if config.model_type == "mistral":
        windows = [config.sliding_window] * config.num_hidden_layers
    dtype = outer.dtype or config.dtype
    return {
        "num_layers": len(attentions),
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": attentions[0].head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_windows": tuple(windows),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_parameters": model.num_parameters(),
        "weights": {name: tuple(each.shape) for name, each in model.named_parameters()},
    }


@pytest.mark.parametrize("case", sorted(CASES))
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    settings = {"model_type": case.partition(" ")[0]} | CASES[case]
    directory = write(tmp_path, **settings if "text_config" in settings else SMALL | settings)
    expected = as_transformers_reads(directory)
    shape = read_model_shape(directory)
    assert all_weights(shape) == expected.pop("weights")
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_silent_file_means_the_family_defaults(family: str, tmp_path: Path) -> None:
    shape = read_model_shape(write(tmp_path, model_type=family))
    config = AutoConfig.from_pretrained(tmp_path)
    names = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    assert [getattr(shape, name) for name in names] == [getattr(config, name) for name in names]
    assert shape.num_layers == config.num_hidden_layers
    assert shape.num_attention_heads == config.num_attention_heads
    assert shape.num_kv_heads == config.num_key_value_heads
    assert shape.head_dim == (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    assert shape.eos_token_ids == (() if config.eos_token_id is None else (config.eos_token_id,))


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    write(tmp_path, model_type="llama", eos_token_id=[7, 8])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    shape = read_model_shape(tmp_path)
    assert shape.eos_token_ids == (9, 7, 8)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("deepseek_v3", {"kv_lora_rank": 512}, "MLA"),
        ("mamba2", {"state_size": 128}, "Mamba"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear-attention"),
        ("t5", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("gpt_oss", {"num_local_experts": 8}, "MoE"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "soft-capping"),
        ("gemma3", {"text_config": {"attn_logit_softcapping": 50.0}}, "soft-capping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("llama4_text_like", {}, "gemma3_text, llama"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "switches the sliding window off"),
        ("qwen2", {"layer_types": ["full_attention"]}, "names 1 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 32}, "chunked_attention"),
        ("mistral", {"num_hidden_layers": 7, "layer_types": LAYERS}, "one window"),
        ("mistral", {"layer_types": ["full_attention"] * 32}, "one window"),
        ("gemma3_text", {"sliding_window": None}, "switches the sliding window off"),
        ("qwen2", {"layer_types": ["x", 3]}, "layers of type 3"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    family: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_model_shape(write(tmp_path, model_type=family, **settings))
    assert reason in f"{caught.value} {caught.value.fix}"
    assert caught.value.field == "model"
    # What native engines do not run, vLLM may; a broken config.json is nobody's.
    assert re.search("--engine vllm|Correct config.json", str(caught.value.fix))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_impossible_sizes_are_named(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        read_model_shape(write(tmp_path, model_type="llama", **settings))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 24)]
)
def test_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_shape(tmp_path)


def test_missing_file_says_what_a_model_directory_holds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model_shape(tmp_path)
    assert "config.json" in str(caught.value.fix)
