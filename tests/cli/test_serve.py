from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from pdlaunch.errors import ConfigError
from pdlaunch.launch.launch import check_platform
from pdlaunch.machine.facts import Gpu, Machine
from tests.checks.contexts import TINY
from tests.command_line import invoke
from tests.config.model_files.files import write_weights

CPU = Machine(num_cpus=2, memory_bytes=64 * 1024**3)
GPUS = Machine(num_cpus=2, gpus=(Gpu(0), Gpu(1)))


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    write_weights(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))


def serve(*arguments: str, columns: int = 80) -> Result:
    command = ["serve", *arguments]
    return invoke(command, env={"COLUMNS": str(columns), "NO_COLOR": "1"})


def test_dry_run_prints_the_plan_as_json_and_nothing_else(model: str) -> None:
    result = serve(
        "--model", model, "--dry-run", "--format", "json", "--prefill", "2", "--decode-tp", "2"
    )
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert [process["name"] for process in plan["processes"]] == [
        "prefill-0/rank-0",
        "prefill-1/rank-0",
        "decode-0/rank-0",
        "decode-0/rank-1",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "router",
    ]
    assert {"host", "command", "environment", "ports", "devices"} <= set(plan["processes"][0])


@pytest.mark.parametrize("output", ["table", "json"])
def test_a_dry_run_says_which_engine_is_chosen_and_why(model: str, output: str) -> None:
    result = serve("--model", model, "--dry-run", "--format", output)
    assert "native, because no vllm was found; vLLM: install vllm with pip" in result.stdout
    assert "because" not in serve("--model", model, "--engine", "native", "--dry-run").stdout


@pytest.mark.parametrize("flag", ["--enable-cumem-allocator", "--enable-sleep-mode"])
@pytest.mark.parametrize("dry_run", [("--dry-run",), ("--dry-run", "--format", "json"), ()])
def test_a_dry_run_refuses_what_serve_refuses(
    model: str, flag: str, dry_run: tuple[str, ...]
) -> None:
    result = serve("--model", model, "--device", "cpu", flag, *dry_run)
    assert result.exit_code == 1
    assert f"error PD202 {flag[2:].replace('-', '_')} ({flag})" in result.stderr
    assert result.stdout == ""


def test_a_dry_run_for_another_machine_is_judged_for_it(model: str) -> None:
    given = ("--model", model, "--dry-run", "--enable-cumem-allocator", "--assume")
    assert serve(*given, "h100x8").exit_code == 0
    assert serve(*given, "h100x8", "--device", "cpu").exit_code == 1
    assert serve(*given, "cpu").exit_code == 1


def test_a_dry_run_prints_commands_that_can_be_copied(model: str) -> None:
    result = serve("--model", model, "--dry-run", columns=40)
    assert result.exit_code == 0
    assert " -m pdlaunch.engine --name decode-0/rank-0" in result.stdout
    assert "router on local, no device, http port 8000" in result.stdout.splitlines()


def test_nothing_is_written_by_a_dry_run_or_a_refusal(model: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = serve("--model", model, "--format", "json")
    assert result.exit_code == 2
    assert "--format json" in result.stderr
    assert "--dry-run" in result.stderr
    assert serve("--model", model, "--dry-run").exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_secrets_are_never_printed(model: str) -> None:
    for output in ("json", "table"):
        result = serve(
            "--model", model, "--api-key", "very-secret", "--dry-run", "--format", output
        )
        assert result.exit_code == 0
        assert "very-secret" not in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("--model", "/no/such/model"), "fix:"), (("/no/such/file.yaml",), "no such file")],
)
def test_unusable_input_is_explained_with_code_2(
    model: str, arguments: tuple[str, ...], expected: str
) -> None:
    result = serve(*(() if "--model" in arguments else ("--model", model)), *arguments, "--dry-run")
    assert result.exit_code == 2
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not result.exception or isinstance(result.exception, SystemExit)


def test_other_systems_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as raised:
        check_platform("darwin")
    assert "container" in (raised.value.fix or "")


def test_dry_run_shows_which_rank_goes_to_which_host_and_device(model: str, tmp_path: Path) -> None:
    config = tmp_path / "deploy.yaml"
    config.write_text(
        f"model: {model}\nplacement: hosts\ncontrol_address: 10.0.0.1\nport: 0\n"
        "kv_transfer: {trusted_network: true}\nplacement_strategy: spread\n"
        "decode: {tensor_parallel_size: 2}\n"
        "hosts: [{name: node-1, machine: h100x2}, {name: node-2, machine: h100x2}]\n"
    )
    result = serve(str(config), "--dry-run", "--format", "json", "--assume", "h100x2")
    assert result.exit_code == 0, result.stdout + result.stderr
    plan = json.loads(result.stdout)
    where = {p["name"]: (p["host"], p["devices"]) for p in plan["processes"]}
    assert where == {
        "prefill-0/rank-0": ("node-1", ["cuda:0"]),
        "decode-0/rank-0": ("node-2", ["cuda:0"]),
        "decode-0/rank-1": ("node-2", ["cuda:1"]),
        "prefill-0": ("node-1", []),
        "decode-0": ("node-2", []),
        "router": ("local", []),
    }
    lines = serve(str(config), "--dry-run", "--assume", "h100x2").stdout.splitlines()
    assert any(line.startswith("decode-0/rank-1 on node-2, cuda:1") for line in lines)
