"""Models that native engines cannot serve: refused there, and left to engines of vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.command_line import invoke
from tests.launch.engines.test_vllm import installed

LATENT = "multi-head latent attention"
HYBRID = "the model is a hybrid"
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"model_type": "mamba", "state_size": 16}, HYBRID),
    "deepseek": ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, LATENT),
    "chunks": ({"model_type": "llama4", "text_config": {"attention_chunk_size": 8192}}, HYBRID),
    "linear": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        HYBRID,
    ),
    "experts": ({"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}, ""),
    "switched off": (
        {"model_type": "qwen2_moe", "sliding_window": 4096, "use_sliding_window": False},
        "",
    ),
    "quantized": ({"model_type": "llama", "quantization_config": {"bits": 4}}, ""),
}
"""config.json of a model, and why pdlaunch's connector for vLLM would refuse it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    return tmp_path


def run(*arguments: str) -> Result:
    given = ["check-config", "--model", "model", *arguments]
    return invoke(given)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_may_serve_what_native_engines_cannot(folder: Path, name: str) -> None:
    config, unproven = MODELS[name]
    (folder / "model" / "config.json").write_text(json.dumps(config))
    command = installed(folder / "one", "0.32.0")
    result = run("--engine", "vllm", "--engine-command", command, "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = {item["rule"]: item["message"] for item in report["findings"]}
    assert "PD103" not in found
    assert unproven in found.get("PD629", "")
    assert ("PD629" in found) == bool(unproven)
    # What needs the shape is not judged, and that is said.
    unchecked = {item["rule"]: item["reason"] for item in report["resolved"]["not_checked"]}
    assert "native engines cannot serve it" in unchecked["PD104"]

    refused = run()
    assert refused.exit_code == 1
    assert "PD103" in refused.output


def test_a_config_json_that_is_broken_is_refused_by_both(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{")
    for flags in ((), ("--engine", "vllm")):
        result = run(*flags)
        assert result.exit_code == 1
        assert "PD103" in result.output
