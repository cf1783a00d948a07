"""``pdlaunch probe`` and ``--assume``: what is said of a machine elsewhere is said there too."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pdlaunch.checks import probes as checks_probes
from pdlaunch.cli import machines
from pdlaunch.machine.availability import PortState
from pdlaunch.machine.machine_file import decode_machine
from pdlaunch.machine.profiles import PROFILES
from tests.checks.contexts import CPU, GB200, GIB, GPU
from tests.cli.test_serve import MODEL
from tests.command_line import invoke
from tests.config.model_files.files import EMPTY_SAFETENSORS

LIVE = {"PD119", "PD420", "PD460"}
"""Rules that look at files, ports and packages of the machine that they run on."""

POOR = replace(
    CPU,
    num_cpus=1,
    has_native_bf16=False,
    memory_bytes=GIB,
    shm_free_bytes=1 << 20,
)


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


def findings(result):
    report = json.loads(result.stdout)
    not_checked = {
        (item["rule"], item["reason"])
        for item in report["resolved"]["not_checked"]
        if item["rule"] not in LIVE
    }
    return [item for item in report["findings"] if item["rule"] not in LIVE], not_checked


@pytest.mark.parametrize("machine", [CPU, POOR, GPU, GB200], ids=["cpu", "poor", "gpu", "gb200"])
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--enable-sleep-mode",),
        ("--prefill-tp", "2", "--decode-tp", "1", "--dtype", "bfloat16"),
        ("--kv-connector", "mooncake", "--kv-offload-memory", "1TiB"),
    ],
)
@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"UCX_TLS": "tcp", "UCX_CUDA_IPC_ENABLE_MNNVL": "n"},
        {
            "CUDA_VISIBLE_DEVICES": "0,0",
            "VLLM_HOST_IP": "10.0.0.1",
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        },
    ],
)
def test_the_verdicts_are_those_of_the_real_machine(
    machine, arguments, environ, tmp_path, monkeypatch
):
    monkeypatch.setattr(machines, "probe_machine", lambda: machine)
    there = run("check-config", "--format", "json", *arguments, **environ)
    (tmp_path / "machine.json").write_text(run("probe", **environ).stdout)
    elsewhere = replace(CPU, system="Darwin", num_cpus=3)
    monkeypatch.setattr(machines, "probe_machine", lambda: elsewhere)
    here = run("check-config", "--format", "json", "--assume", "machine.json", *arguments)
    assert findings(here) == findings(there)
    assert here.exit_code == there.exit_code


@pytest.mark.parametrize("name", [*PROFILES, "h100x2"])
@pytest.mark.parametrize(
    "command", [("check-config",), ("serve", "--dry-run"), ("config", "show"), ("probe",)]
)
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


def test_a_profile_can_be_changed_by_hand(tmp_path):
    machine = json.loads(run("probe", "--assume", "h100x8").stdout)
    machine["shm_free_bytes"] = 1 << 20
    (tmp_path / "m.json").write_text(json.dumps(machine))
    assert "PD416 /dev/shm  1 MiB" in run("check-config", "--assume", "m.json").stdout


def test_a_model_that_is_not_here_is_not_checked(tmp_path):
    elsewhere = ("--assume", "h100x8", "--model", "/models/llama", "--format", "json")
    result = run("check-config", *elsewhere)
    assert result.exit_code == 0
    _, not_checked = findings(result)
    assert "/models/llama" in dict(not_checked)["PD103"]
    assert run("check-config", "--model", "/models/llama").exit_code == 1
    # One that is here and cannot be served is an error.
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL | {"model_type": "mamba"}))
    result = run("check-config", "--assume", "h100x8")
    assert result.exit_code == 1
    assert "PD103" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check-config", "--assume", "h300"), "neither a file nor one of h100x8"),
        (("check-config", "--assume", "~nobody/m.json"), "neither a file nor one of h100x8"),
        (("check-config", "--assume", "m" * 300), "neither a file nor one of h100x8"),
        (("serve", "--assume", "h100x8"), "add --dry-run"),
        (("config", "show", "--assume", "m.json"), "m.json: gpus is missing"),
        (("probe", "--assume", "m.json"), "m.json: gpus is missing"),
        (("check-config", "--assume", "."), "cannot be read"),
        (("check-config", "--assume", "n.json"), 'Input should be a valid integer (it is "80")'),
        (("check-config", "--assume", "n.json"), "run `pdlaunch probe` on that machine again"),
    ],
)
def test_unusable_machines_are_refused(arguments, says, tmp_path):
    (tmp_path / "m.json").write_text("{}")
    (tmp_path / "n.json").write_text('{"gpus": [{"memory_bytes": "80"}]}')
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_the_file_in_the_documents_can_be_read():
    text = (Path(__file__).parents[2] / "docs" / "checking.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    machine = decode_machine(example, "docs").machine
    assert "fabric" not in machine.unknown
    assert machine.gpus[0].free_memory_bytes == 40 * GIB
