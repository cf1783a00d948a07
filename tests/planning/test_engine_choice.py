"""What ``engine: auto`` comes to, and what people are told about it."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.machine.facts import Machine
from pdlaunch.planning.models import choose_engine, fetch_weights, read_models
from tests.config.model_files.files import cached_model
from tests.planning.test_resolve import write_model

REAL = {"model": "Qwen/Qwen3-0.6B"}
CPU = Machine(num_cpus=2)


def environ(folder: Path, *, installed: bool) -> Mapping[str, str]:
    folder.mkdir()
    if installed:
        (folder / "vllm").write_text("#!/bin/sh\n")
        (folder / "vllm").chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("values", "installed", "engine", "reason"),
    [
        (REAL, True, "vllm", "/vllm is installed; native engines: --engine native"),
        (REAL, False, "native", "no vllm was found; vLLM: install vllm with pip in an"),
        ({}, True, "native", "smollm2 is the demo model; vLLM: --engine vllm"),
        ({}, False, "native", "smollm2 is the demo model; vLLM: install vllm with pip"),
        (REAL | {"engine_command": "/no/vllm"}, False, "vllm", "engine_command is set"),
        ({"engine_args": {"seed": 1}}, False, "vllm", "engine_args is set"),
        (REAL | {"prefill": {"engine": "auto"}}, True, "vllm", "is installed"),
        (REAL | {"engine": "native"}, True, "native", ""),
        ({"engine": "vllm"}, False, "vllm", ""),
    ],
)
def test_auto_is_vllm_where_it_is_found_and_the_model_is_not_the_demo(
    tmp_path: Path, values: dict[str, object], installed: bool, engine: str, reason: str
) -> None:
    config = LaunchConfig.model_validate(values)
    chosen = choose_engine(config, environ(tmp_path / "bin", installed=installed))
    assert {chosen.config.engine_settings(role).engine for role in ("prefill", "decode")} == {
        engine
    }
    assert reason in chosen.reason
    assert bool(chosen.reason) == bool(reason)
    assert chosen.reason.startswith(f"{engine}, because " if reason else "")


@pytest.mark.parametrize("variable", ["", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_vllm_of_the_active_environment_is_found_without_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    environ(tmp_path / "bin", installed=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ("none" if variable else "bin") / "x"))
    given = {"PATH": "/none"} | ({variable: str(tmp_path)} if variable else {})
    for engine in ("auto", "vllm"):
        config = LaunchConfig.model_validate(REAL | {"engine": engine})
        found = choose_engine(config, given).config
        assert (found.engine, found.engine_command) == ("vllm", str(tmp_path / "bin" / "vllm"))


def test_models_are_read_for_the_engine_that_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM serves what native engines do not."""
    model = write_model(tmp_path / "mixtral", model_type="mixtral", num_local_experts=8)
    config = LaunchConfig.model_validate({"model": str(model)})
    monkeypatch.setenv("PATH", environ(tmp_path / "bin", installed=True)["PATH"])
    assert read_models(config)["decode"].error is None
    monkeypatch.setenv("PATH", "/none")
    error = read_models(config)["decode"].error
    assert "cannot be served by native engines" in str(error)
    assert "install vllm with pip" in str(getattr(error, "fix", ""))


def test_vllm_is_given_all_files_of_a_hub_that_nobody_else_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached_model(tmp_path, "org/tiny")
    write_model(snapshot, model_type="mixtral", num_local_experts=8)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = LaunchConfig.model_validate({"engine": "vllm", "model": "org/tiny"})
    asked: list[object] = []
    models = read_models(config)
    fetch_weights(config, models, lambda *each: asked.append(each))
    assert asked == [("org/tiny", snapshot.name, "all")]
    assert models["decode"].path == str(snapshot)
