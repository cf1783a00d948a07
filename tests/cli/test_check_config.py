"""What check-config accepts and finds, and with which exit code it says so."""

import json

import pytest

from pdlaunch.checks import probes
from pdlaunch.checks.probed import NixlAnswer
from pdlaunch.cli import check_config as module
from pdlaunch.machine.availability import PortState
from tests.config.model_files.files import EMPTY_SAFETENSORS, tiny_gguf


class TestExitCodes:
    def test_clean(self, check):
        assert check().exit_code == 0

    def test_warnings_only_when_strict(self, check, file):
        path = file("kv_transfer: {verify: off}\n")
        assert check(path).exit_code == 0
        assert check(path, "--strict").exit_code == 1

    @pytest.mark.parametrize("text", ["a: [", "\tx: 1", "prefil: {}", "port: x", "- 1"])
    def test_unusable_input(self, check, file, text):
        result = check(file(text))
        assert result.exit_code == 2
        assert "deploy.yaml:1:" in result.stderr or "deploy.yaml:2:" in result.stderr
        assert result.stdout == ""

    def test_an_unknown_variable(self, check):
        result = check(PDLAUNCH_PREFIL="2")
        assert result.exit_code == 2
        assert "did you mean PDLAUNCH_PREFILL?" in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--assume", "tpu"),
            ("--assume", "h100x0"),
            ("--assume", "h100x8", "--probe"),
            ("--port", "x"),
            ("--no-such-flag",),
            ("--format", "xml"),
        ],
    )
    def test_unusable_flags(self, check, arguments):
        result = check(*arguments)
        assert result.exit_code == 2
        assert result.stderr


class TestModelFiles:
    def findings(self, check, *arguments, **environ):
        report = json.loads(check(*arguments, "--format", "json", **environ).stdout)
        return [
            (item["rule"], item["where"], item["message"], item["fix"])
            for item in report["findings"]
        ]

    def test_pickles_alone(self, check, model):
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        result = check()
        assert result.exit_code == 1
        ((code, where, message, fix),) = self.findings(check)
        assert (code, where) == ("PD119", "model (PDLAUNCH_MODEL)")
        assert "only as pickles (pytorch_model.bin)" in message
        assert "safetensors" in fix

    def test_weights_that_are_cut_off_or_missing(self, check, model):
        (model / "model.safetensors").write_bytes(EMPTY_SAFETENSORS[:9])
        ((code, _, message, fix),) = self.findings(check)
        assert code == "PD119"
        assert "model.safetensors is damaged: it is cut off" in message
        assert "Download the file again" in fix
        (model / "model.safetensors").unlink()
        ((code, _, message, _),) = self.findings(check)
        assert code == "PD119"
        assert "has no model*.safetensors" in message

    def test_nobody_reads_the_weights_of_dummies_or_of_another_machine(self, check, model):
        (model / "model.safetensors").unlink()
        assert "PD119" not in {
            item[0] for item in self.findings(check, PDLAUNCH_LOAD_FORMAT="dummy")
        }
        result = check("--assume", "cpu", "--format", "json")
        assert result.exit_code == 0
        assert "PD119" in {
            item["rule"] for item in json.loads(result.stdout)["resolved"]["not_checked"]
        }

    @pytest.mark.parametrize("length", [0, 4, 600, 20_000])
    def test_a_damaged_gguf(self, check, tmp_path, length):
        file = tmp_path / "cut.gguf"
        file.write_bytes(tiny_gguf().encode()[:length])
        result = check("--model", file)
        assert result.exit_code == 1
        ((code, _, message, fix),) = self.findings(check, "--model", file)
        assert code == "PD103"
        assert f"{file} is damaged: " in message
        assert "Download the file again" in fix


class TestMemoryOptions:
    EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def test_the_connector_and_expandable_segments(self, check):
        result = check("--assume", "cuda", columns="300", **self.EXPANDABLE)
        assert result.exit_code == 1
        assert "--enable-cumem-allocator" in result.stdout
        assert "--enable-sleep-mode" in result.stdout

    @pytest.mark.parametrize("name", ["ENABLE_CUMEM_ALLOCATOR", "ENABLE_SLEEP_MODE"])
    def test_flag_variable_and_file_reach_the_same_field(self, check, file, name):
        flag = f"--{name.lower().replace('_', '-')}"
        results = [
            check(flag),
            check(**{f"PDLAUNCH_{name}": "1"}),
            check(file(f"{name.lower()}: true\n")),
        ]
        assert [result.exit_code for result in results] == [1, 1, 1]
        for result in results:
            assert "cumem allocator is not supported" in " ".join(result.stdout.split())
            assert "no CUDA driver" in " ".join(result.stdout.split())


def test_a_busy_port_is_named(check, monkeypatch):
    monkeypatch.setattr(probes, "probe_port", lambda host, port: PortState("busy"))
    result = check("--port", 9000)
    assert result.exit_code == 1
    assert "port 9000" in result.stdout


def test_a_busy_port_of_an_engine_is_named(check, file, monkeypatch):
    path = file("engine_api_key: k\ndecode: {port: 9100, replicas: 2}\n")
    monkeypatch.setattr(
        probes, "probe_port", lambda host, port: PortState("busy" if port == 9101 else None)
    )
    result = check(path, columns="200")
    assert result.exit_code == 1
    assert "PD420" in result.stdout
    assert "port 9101 of 127.0.0.1 for the server of decode-1 is busy" in result.stdout


@pytest.mark.parametrize("assumed", [False, True])
def test_a_folder_that_cannot_be_written_to_is_found_on_this_machine(check, tmp_path, assumed):
    (tmp_path / "kv").touch()
    folder = ("--kv-connector", "file", "--kv-file-directory", tmp_path / "kv")
    result = check(*folder, *(["--assume", "cpu"] if assumed else []), columns="200")
    assert result.exit_code == (0 if assumed else 1)
    assert ("kv is no folder" in result.stdout) is not assumed
    assert "PD419" in result.stdout


def test_probe_asks_nixl(check, monkeypatch):
    answer = NixlAnswer(import_error="undefined symbol: ucp_init")
    monkeypatch.setattr(module, "ask_nixl", lambda launch: {"prefill": answer})
    result = check("--probe")
    assert result.exit_code == 1
    assert "undefined symbol: ucp_init" in result.stdout
