"""Models that native engines cannot serve: refused there, and left to engines of vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.command_line import invoke
from tests.launch.engines.test_vllm import installed

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "state_size": 16},
    "deepseek": {"model_type": "deepseek_v3", "kv_lora_rank": 512},
    "windows": {"model_type": "gemma2", "sliding_window": 4096},
    "linear": {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
    "images": {"model_type": "llava", "text_config": {"model_type": "llama"}},
    "quantized": {"model_type": "llama", "quantization_config": {"bits": 4}},
}
"""config.json of a model; what pdlaunch's connector makes of it, its workers find at the start."""


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
    (folder / "model" / "config.json").write_text(json.dumps(MODELS[name]))
    command = installed(folder / "one", "0.32.0")
    result = run("--engine", "vllm", "--engine-command", command, "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert "PD103" not in {item["rule"] for item in report["findings"]}
    # What needs the shape is not judged, and that is said.
    unchecked = {item["rule"]: item["reason"] for item in report["resolved"]["not_checked"]}
    assert "native engines cannot serve it" in unchecked["PD104"]

    refused = run()
    assert refused.exit_code == 1
    assert "PD103" in refused.output
