from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from pdlaunch.cli.preflight import judge_pairs, refuse_errors
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.launch.status import LaunchPhase, LaunchStatus
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.resolve import ResolvedLaunch, resolve
from pdlaunch.protocol.control import PairReady
from tests.checks.contexts import TINY

CPU = Machine(num_cpus=2, memory_bytes=64 * 1024**3)
GPUS = Machine(num_cpus=2, gpus=(Gpu(0), Gpu(1)))
Refused = Callable[..., str]


def resolved(loaded: LoadedConfig, machine: Machine) -> ResolvedLaunch:
    return resolve(loaded.config, {"here": machine}, {})


def measured(speed: float) -> LaunchStatus:
    pair = PairReady(
        local="decode-0/rank-0",
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path="nixl/UCX",
        gigabytes_per_s=speed,
        other_paths={},
    )
    return LaunchStatus(LaunchPhase.READY, (), pairs=(pair,))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Refuse a launch with these settings; return what is printed."""
    monkeypatch.setenv("COLUMNS", "500")

    def refuse(machine: Machine, **flags: object) -> str:
        loaded = load_config(None, {}, flags)
        with pytest.raises(typer.Exit) as raised:
            refuse_errors(resolved(loaded, machine), loaded.origins)
        assert raised.value.exit_code == 1
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize(
    ("kind", "rule", "fix"),
    [
        ("damaged .gguf", "PD103", "Download the file again"),
        ("pickles", "PD119", "Convert them to safetensors"),
    ],
)
def test_models_that_cannot_be_read_refuse_the_start_in_words(
    refused: Refused, kind: str, rule: str, fix: str, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    if kind == "pickles":
        model.mkdir()
        (model / "config.json").write_text(json.dumps(TINY))
        (model / "pytorch_model.bin").write_bytes(b"PK")
    else:
        model.write_bytes(b"PK")
    problem, said, *_, end = refused(CPU, model=str(model)).splitlines()
    assert problem.startswith(f"error {rule} model")
    assert said.startswith(f"  fix: {fix}")
    assert end.startswith("not started: ")


@pytest.mark.parametrize(
    ("machine", "flags", "speed", "expected"),
    [
        (GPUS, {"enable_cumem_allocator": True}, 0.6, ["PD503"]),
        (GPUS, {"enable_cumem_allocator": True}, 300.0, []),
        (GPUS, {"kv_transfer.nixl.path": "nixl"}, 0.6, ["PD504"]),
        (CPU, {}, 1000.0, []),
        (CPU, {}, 0.0001, ["PD504"]),
    ],
)
def test_measured_pairs_are_judged_with_the_allocator_of_the_launch(
    machine: Machine, flags: dict[str, object], speed: float, expected: list[str]
) -> None:
    loaded = load_config(None, {}, flags)
    findings = judge_pairs(resolved(loaded, machine), loaded.origins, measured(speed))
    assert [finding.rule for finding in findings] == expected
