"""``--assume``: a machine by its name is judged in place of this one."""

from __future__ import annotations

import json
import os

import pytest

from pdlaunch.checks import probes as checks_probes
from pdlaunch.machine.availability import PortState
from pdlaunch.machine.profiles import PROFILES
from tests.cli.test_serve import MODEL
from tests.command_line import invoke
from tests.config.model_files.files import EMPTY_SAFETENSORS


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PDLAUNCH_", "PYTORCH_", "UCX_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "model" / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    monkeypatch.setenv("PDLAUNCH_MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(checks_probes, "probe_port", lambda host, port: PortState())
    monkeypatch.setattr(checks_probes, "missing_modules", lambda extras: {})
    monkeypatch.chdir(tmp_path)


def run(*arguments, **environ):
    result = invoke(list(arguments), env={"COLUMNS": "200", **environ})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


@pytest.mark.parametrize("name", [*PROFILES, "h100x2"])
@pytest.mark.parametrize("command", [("check-config",), ("serve", "--dry-run"), ("config", "show")])
def test_every_profile_works_with_every_command(name, command):
    result = run(*command, "--assume", name)
    assert result.exit_code == 0, result.output
    assert result.stdout


def test_the_plan_and_the_settings_are_those_of_the_machine():
    plan = json.loads(run("serve", "--dry-run", "--format", "json", "--assume", "h200x2").stdout)
    assert plan["engines"]["decode"]["device"] == "cuda"
    assert [process["devices"] for process in plan["processes"][:2]] == [["cuda:0"], ["cuda:1"]]
    shown = json.loads(run("config", "show", "--format", "json", "--assume", "h200x2").stdout)
    assert shown["prefill.device"]["value"] == "cuda"


def test_a_model_that_is_not_here_is_not_checked(tmp_path):
    elsewhere = ("--assume", "h100x8", "--model", "/models/llama", "--format", "json")
    result = run("check-config", *elsewhere)
    assert result.exit_code == 0
    not_checked = json.loads(result.stdout)["resolved"]["not_checked"]
    reasons = {item["rule"]: item["reason"] for item in not_checked}
    assert "/models/llama" in reasons["PD103"]
    assert run("check-config", "--model", "/models/llama").exit_code == 1
    # One that is here and cannot be served is an error.
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL | {"model_type": "mamba"}))
    result = run("check-config", "--assume", "h100x8")
    assert result.exit_code == 1
    assert "PD103" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check-config", "--assume", "h300"), "none of h100x8"),
        (("serve", "--assume", "h100x8"), "add --dry-run"),
    ],
)
def test_unusable_machines_are_refused(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""
