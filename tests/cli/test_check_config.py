"""What check-config accepts and finds, and with which exit code it says so."""

import json

import pytest

from pdlaunch.checks import probes
from pdlaunch.machine.availability import PortState
from tests.config.model_files.files import EMPTY_SAFETENSORS


def test_warnings_fail_only_when_strict(check, file):
    assert check().exit_code == 0
    path = file("kv_transfer: {verify: off}\n")
    assert check(path).exit_code == 0
    assert check(path, "--strict").exit_code == 1


@pytest.mark.parametrize("text", ["a: [", "\tx: 1", "prefil: {}", "port: x", "- 1"])
def test_an_unusable_file_is_told_with_its_place(check, file, text):
    result = check(file(text))
    assert result.exit_code == 2
    assert "deploy.yaml:1:" in result.stderr or "deploy.yaml:2:" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--assume", "tpu"),
        ("--assume", "h100x0"),
        ("--port", "x"),
        ("--no-such-flag",),
        ("--format", "xml"),
    ],
)
def test_unusable_flags_and_variables(check, arguments):
    result = check(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert "did you mean PDLAUNCH_PREFILL?" in check(PDLAUNCH_PREFIL="2").stderr


def findings(check, *arguments, **environ):
    report = json.loads(check(*arguments, "--format", "json", **environ).stdout)
    return [
        (item["rule"], item["where"], item["message"], item["fix"]) for item in report["findings"]
    ]


def test_pickles_alone(check, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    ((code, where, message, fix),) = findings(check)
    assert (code, where) == ("PD119", "model (PDLAUNCH_MODEL)")
    assert "only as pickles (pytorch_model.bin)" in message
    assert "safetensors" in fix


def test_weights_that_are_cut_off_or_missing(check, model):
    (model / "model.safetensors").write_bytes(EMPTY_SAFETENSORS[:9])
    ((code, _, message, fix),) = findings(check)
    assert code == "PD119"
    assert "model.safetensors is damaged: it is cut off" in message
    assert "Download the file again" in fix
    (model / "model.safetensors").unlink()
    ((_, _, message, _),) = findings(check)
    assert "has no model*.safetensors" in message
    # Nobody reads the weights of dummies, or of another machine.
    dummies = findings(check, PDLAUNCH_LOAD_FORMAT="dummy")
    assert "PD119" not in {item[0] for item in dummies}
    elsewhere = json.loads(check("--assume", "cpu", "--format", "json").stdout)
    assert elsewhere["ok"]
    assert "PD119" in {item["rule"] for item in elsewhere["resolved"]["not_checked"]}


def test_a_damaged_gguf(check, tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"")
    ((code, _, message, fix),) = findings(check, "--model", file)
    assert code == "PD103"
    assert f"{file} is damaged: " in message
    assert "Download the file again" in fix


def test_the_connector_and_expandable_segments(check):
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    result = check("--assume", "cuda", columns="300", **environ)
    assert result.exit_code == 1
    assert "--enable-cumem-allocator" in result.stdout
    assert "--enable-sleep-mode" in result.stdout


def test_busy_ports_are_named(check, file, monkeypatch):
    busy = {9000, 9101}
    states = {port: PortState("busy") for port in busy}
    monkeypatch.setattr(probes, "probe_port", lambda host, port: states.get(port, PortState()))
    result = check("--port", 9000)
    assert result.exit_code == 1
    assert "port 9000" in result.stdout
    path = file("engine_api_key: k\ndecode: {port: 9100, replicas: 2}\n")
    result = check(path, columns="200")
    assert result.exit_code == 1
    assert "PD420" in result.stdout
    assert "port 9101 of 127.0.0.1 for the server of decode-1 is busy" in result.stdout
