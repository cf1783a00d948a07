import json
from pathlib import Path

import pytest
from typer.testing import Result

from pdlaunch.errors import ConfigError
from pdlaunch.launch.launch import check_platform
from tests.command_line import invoke


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))


def serve(*arguments: object, columns: int = 80) -> Result:
    command = ["serve", *map(str, arguments)]
    return invoke(command, env={"COLUMNS": str(columns), "NO_COLOR": "1"})


@pytest.mark.parametrize("flag", ["--enable-cumem-allocator", "--enable-sleep-mode"])
@pytest.mark.parametrize("dry_run", [("--dry-run",), ("--dry-run", "--format", "json"), ()])
def test_a_dry_run_refuses_what_serve_refuses(
    model: Path, flag: str, dry_run: tuple[str, ...]
) -> None:
    result = serve("--model", model, "--device", "cpu", flag, *dry_run)
    assert result.exit_code == 1
    assert f"error PD202 {flag[2:].replace('-', '_')} ({flag})" in result.stderr
    assert result.stdout == ""


def test_a_dry_run_for_another_machine_is_judged_for_it(model: Path) -> None:
    given = ("--model", model, "--dry-run", "--enable-cumem-allocator", "--assume")
    assert serve(*given, "h100x8").exit_code == 0
    assert serve(*given, "h100x8", "--device", "cpu").exit_code == 1
    assert serve(*given, "cpu").exit_code == 1


def test_a_dry_run_prints_commands_to_copy_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = serve("--model", model, "--format", "json")
    assert result.exit_code == 2
    assert "--format json" in result.stderr
    assert "--dry-run" in result.stderr
    result = serve("--model", model, "--dry-run", columns=40)
    assert result.exit_code == 0
    assert "native, because no vllm was found; vLLM: install vllm with pip" in result.stdout
    assert " -m pdlaunch.engine --name decode-0/rank-0" in result.stdout
    assert "router on local, no device, http port 8000" in result.stdout.splitlines()
    assert sorted(tmp_path.rglob("*")) == before


def test_secrets_are_never_printed(model: Path, tmp_path: Path) -> None:
    settings = {"api_key": "very-secret", "env": {"HF_TOKEN": "very-secret", "OTHER": "shown"}}
    file = tmp_path / "deploy.yaml"
    file.write_text(json.dumps({"model": str(model), **settings}))
    for output in ("json", "table"):
        result = serve(file, "--dry-run", "--format", output)
        assert result.exit_code == 0
        assert "very-secret" not in result.output
        assert "shown" in result.output


def test_other_systems_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as raised:
        check_platform("darwin")
    assert "container" in (raised.value.fix or "")


def test_dry_run_shows_which_rank_goes_to_which_host_and_device(
    model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "deploy.yaml"
    config.write_text(
        f"model: {model}\nplacement: hosts\ncontrol_address: 10.0.0.1\nport: 0\n"
        "kv_transfer: {trusted_network: true}\nplacement_strategy: spread\n"
        "hosts: [{name: node-1, machine: h100x2}, {name: node-2, machine: h100x2}]\n"
    )
    given = (config, "--decode-tp", "2", "--dry-run", "--assume", "h100x2")
    plan = json.loads(serve(*given, "--format", "json").stdout)
    assert plan["engine"].startswith("native, because no vllm was found")
    assert {"host", "command", "environment", "ports", "devices"} <= set(plan["processes"][0])
    where = {each["name"]: (each["host"], each["devices"]) for each in plan["processes"]}
    assert where["decode-0/rank-1"] == ("node-2", ["cuda:1"])
    assert where["router"] == ("local", [])
    lines = serve(*given).stdout.splitlines()
    assert any(line.startswith("decode-0/rank-1 on node-2, cuda:1") for line in lines)
