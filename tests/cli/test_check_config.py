import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from pdlaunch.checks import probes
from pdlaunch.checks.nixl_answers import NixlAnswer
from pdlaunch.checks.registry import all_rules
from pdlaunch.cli import assume as assume_module
from pdlaunch.cli import check_config as module
from pdlaunch.cli.app import build_app
from pdlaunch.platform.facts import PortState
from tests.checks.contexts import CPU
from tests.config.model_files.files import EMPTY_SAFETENSORS, tiny_gguf

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    return folder


@pytest.fixture
def check(model, monkeypatch):
    """Run check-config on a healthy machine with a free port."""
    for name in [name for name in os.environ if name.startswith(("PDLAUNCH_", "PYTORCH_", "UCX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PDLAUNCH_MODEL", str(model))
    monkeypatch.setattr(assume_module, "probe_machine", lambda: CPU)
    monkeypatch.setattr(probes, "probe_port", lambda host, port: PortState())

    def run(*arguments, columns="80", **environ):
        arguments = ["check-config", *map(str, arguments)]
        result = CliRunner().invoke(
            build_app(arguments), arguments, env={"COLUMNS": columns, "NO_COLOR": "1", **environ}
        )
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return result

    return run


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "deploy.yaml"
        path.write_text(text)
        return path

    return write


class TestExitCodes:
    def test_clean(self, check):
        assert check().exit_code == 0

    def test_errors(self, check):
        assert check("--max-model-len", 1000).exit_code == 1

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

    def test_a_missing_file(self, check, tmp_path):
        result = check(tmp_path / "none.yaml")
        assert result.exit_code == 2
        assert "no such file" in result.stderr

    def test_an_unknown_variable(self, check):
        result = check(PDLAUNCH_PREFIL="2")
        assert result.exit_code == 2
        assert "did you mean PDLAUNCH_PREFILL?" in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--assume-platform", "tpu"),
            ("--assume-platform", "cpu", "--assume", "h100x8"),
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
        result = check("--assume-platform", "cpu", "--format", "json")
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

    def test_a_whole_gguf(self, check, tmp_path):
        assert check("--model", tiny_gguf().write(tmp_path / "whole.gguf")).exit_code == 0


class TestJson:
    def test_the_form(self, check, file):
        result = check(file("decode:\n  max_model_len: 1000\n"), "--format", "json")
        report = json.loads(result.stdout)
        assert list(report) == ["ok", "findings", "resolved"]
        assert report["ok"] is False
        assert report["findings"], "max_model_len is over the model's"
        finding = next(finding for finding in report["findings"] if finding["rule"] == "PD106")
        assert list(finding) == ["rule", "severity", "where", "message", "fix"]
        assert finding["severity"] == "error"
        assert finding["where"].startswith("decode.max_model_len (")
        assert finding["where"].endswith("deploy.yaml:2:18)")
        assert report["resolved"]["engines"]["prefill"]["max_model_len"] == 512

    def test_ok_follows_strict(self, check, file):
        path = file("kv_transfer: {verify: off}\n")
        assert json.loads(check(path, "--format", "json").stdout)["ok"] is True
        assert json.loads(check(path, "--format", "json", "--strict").stdout)["ok"] is False

    def test_unusable_input_too(self, check, file):
        result = check(file("prefil: {}\n"), "--format", "json")
        report = json.loads(result.stdout)
        assert (result.exit_code, report["ok"], report["resolved"]) == (2, False, {})
        assert report["findings"][0]["message"] == "prefil: unknown field"
        assert report["findings"][0]["fix"] == "did you mean prefill?"

    def test_what_was_not_checked_is_there(self, check):
        report = json.loads(check("--format", "json").stdout)
        assert {"PD404", "PD501"} <= {item["rule"] for item in report["resolved"]["not_checked"]}


class TestGithub:
    def test_annotations_point_at_the_line(self, check, file):
        path = file("decode:\n  max_model_len: 1000\n")
        (line, *_) = check(path, "--format", "github").stdout.splitlines()
        assert line.startswith(
            f"::error file={path},line=2,col=18,title=PD106::decode.max_model_len: "
        )

    def test_findings_without_a_file(self, check):
        (line, *_) = check("--max-model-len", 1000, "--format", "github").stdout.splitlines()
        assert line.startswith("::error title=PD106::")

    def test_unusable_input(self, check, file):
        path = file("port: [\n")
        (line,) = check(path, "--format", "github").stdout.splitlines()
        assert line.startswith(f"::error file={path},line=2,col=1,title=configuration::")

    def test_warnings_and_infos(self, check, file):
        lines = check(
            file("kv_transfer: {verify: off}\nload_format: dummy\n"), "--format", "github"
        ).stdout.splitlines()
        *found, unchecked = lines
        assert [line.partition(" ")[0] for line in found] == ["::warning", "::notice"]
        assert unchecked.startswith("::notice title=not checked::PD404, ")
        assert unchecked.endswith("to PD505: only with --probe")

    def test_what_needs_a_fact_names_it(self, check):
        lines = check("--assume", "h100x8", "--format", "github").stdout.splitlines()
        assert (
            "::notice title=not checked::PD416, PD417 need shm: profile h100x8 does not say"
            in lines
        )


class TestTable:
    @pytest.mark.parametrize("columns", ["40", "80", "200"])
    def test_grouped_by_severity_at_any_width(self, check, file, columns):
        path = file("kv_transfer: {verify: off}\nmax_model_len: 1000\nload_format: dummy\n")
        output = check(path, columns=columns).stdout
        headings = [
            line
            for line in output.splitlines()
            if line in ("error", "errors", "warning", "info", "not checked")
        ]
        assert headings == ["error", "warning", "info"]
        assert "not ok: 1 error, 1 warning, 1 info" in " ".join(output.split())
        assert max(len(line) for line in output.splitlines()) <= int(columns)

    @pytest.mark.parametrize("columns", range(80, 200, 20))
    def test_a_finding_that_needs_several_lines_is_indented(self, check, columns):
        lines = check("--kv-offload-memory", "4TiB", columns=str(columns)).stdout.splitlines()
        start = next(number for number, line in enumerate(lines) if "PD221" in line)
        end = next(number for number, line in enumerate(lines) if line.startswith("not ok"))
        assert all(line.startswith(" " * 8) for line in lines[start + 1 : end])
        assert all(line == line.rstrip() for line in lines)

    def test_a_clean_run_is_one_line(self, check):
        (line,) = check().stdout.splitlines()
        assert re.fullmatch(
            r"ok: no findings; not checked without --probe: PD404 and \d+ more", line
        )
        assert len(line) <= 80

    def test_facts_that_are_missing_are_named(self, check):
        lines = check("--assume", "h100x8", columns="200").stdout.splitlines()
        assert lines[0] == "not checked"
        assert "  PD416, PD417 need shm: profile h100x8 does not say" in lines
        assert "  PD119 needs weights: files of weights were not looked at" in lines
        assert lines[-2].startswith("for h100x8: 8 x H100 SXM5 80 GB in a DGX H100; taken for")
        assert lines[-1] == "ok: no findings"

    def test_lines_of_a_pipe_are_whole(self, check, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        output = check("--kv-offload-memory", "4TiB", columns=None).stdout
        (line,) = [line for line in output.splitlines() if line.startswith("  PD221")]
        assert len(line) > 80
        assert line.endswith("64 GiB")
        assert "\x1b" not in output

    def test_a_terminal_without_colour_gets_none(self, check, monkeypatch):
        monkeypatch.setattr(
            module, "report_console", lambda: Console(force_terminal=True, width=80)
        )
        output = check("--kv-offload-memory", "4TiB").stdout
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", output), "NO_COLOR is set"
        text = Text.from_ansi(output).plain
        assert max(map(len, text.splitlines())) <= 80
        assert "error\n  PD221" in text

    def test_a_variable_of_the_file_is_shown_there(self, check, file):
        path = file("env: {UCX_TLS: tcp}\n")
        assert f"PD433 env.UCX_TLS ({path}:1:16)" in check(path, columns="300").stdout
        assert "PD433 environment UCX_TLS" in check(columns="300", UCX_TLS="tcp").stdout

    def test_the_fix_and_the_way_to_more(self, check):
        output = check("--max-model-len", 1000, columns="200").stdout
        assert "fix: set it to 512 or less, or leave it out" in output
        assert "pdlaunch explain PD106" in output


class TestSarif:
    def log(self, check, *arguments):
        log = json.loads(check(*arguments, "--format", "sarif").stdout)
        assert log["version"] == "2.1.0"
        assert log["$schema"].endswith("sarif-schema-2.1.0.json")
        (run,) = log["runs"]
        return run

    def test_what_the_standard_requires(self, check, file):
        path = file("kv_transfer: {verify: off}\nmax_model_len: 1000\nload_format: dummy\n")
        run = self.log(check, path, "--assume", "h100x8")
        driver = run["tool"]["driver"]
        assert driver["name"]
        rules = driver["rules"]
        assert len({rule["id"] for rule in rules}) == len(rules)
        for rule in rules:
            assert rule["shortDescription"]["text"]
            assert rule["fullDescription"]["text"]
            assert rule["help"]["text"]
            assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert result["message"]["text"]
        (invocation,) = run["invocations"]
        for note in invocation["toolExecutionNotifications"]:
            assert note["level"] == "note"
            rule = note["associatedRule"]
            assert rules[rule["index"]]["id"] == rule["id"]
        assert (invocation["executionSuccessful"], invocation["exitCode"]) == (True, 1)

    def test_findings_point_at_the_line(self, check, file):
        path = file("decode:\n  max_model_len: 1000\n")
        (result, *_) = self.log(check, path)["results"]
        assert (result["ruleId"], result["level"]) == ("PD106", "error")
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert place["artifactLocation"]["uri"] == path.as_uri()
        assert place["region"] == {"startLine": 2, "startColumn": 18}
        assert location["logicalLocations"] == [{"fullyQualifiedName": "decode.max_model_len"}]

    def test_a_relative_file_stays_relative_and_is_escaped(self, check, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my deploy%.yaml").write_text("load_format: dummy\n")
        (result,) = self.log(check, "my deploy%.yaml")["results"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"] == {"uri": "my%20deploy%25.yaml"}
        assert result["level"] == "note"

    def test_findings_of_flags_are_at_the_file(self, check, file):
        path = file("")
        (result, *_) = self.log(check, path, "--max-model-len", 1000)["results"]
        assert result["locations"][0]["physicalLocation"] == {
            "artifactLocation": {"uri": path.as_uri()}
        }
        (result, *_) = self.log(check, "--max-model-len", 1000)["results"]
        assert "physicalLocation" not in result["locations"][0]

    def test_rules_that_were_not_checked_are_notes(self, check):
        run = self.log(check, "--assume", "h100x8")
        notes = {
            note["associatedRule"]["id"]: note["message"]["text"]
            for note in run["invocations"][0]["toolExecutionNotifications"]
        }
        assert notes["PD417"] == "not checked: needs shm: profile h100x8 does not say"
        assert "PD404" in notes
        assert run["results"] == []

    def test_unusable_input(self, check, file):
        path = file("port: [\n")
        run = self.log(check, path)
        (result,) = run["results"]
        assert (result["ruleId"], result["level"]) == ("input", "error")
        assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 2
        assert run["invocations"][0]["executionSuccessful"] is False
        assert run["invocations"][0]["exitCode"] == 2


class TestJunit:
    def cases(self, check, *arguments):
        root = ElementTree.fromstring(check(*arguments, "--format", "junit").stdout)
        (suite,) = root.findall("testsuite")
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(name)) == len(suite.findall(f"testcase/{tag}"))
        assert all(case.get("classname") and case.get("name") for case in cases)
        assert all(len(case) <= 1 for case in cases), "one outcome each"
        return {case.get("name").split()[0]: next(iter(case), None) for case in cases}

    def test_every_rule_is_a_test(self, check, file):
        path = file("kv_transfer: {verify: off}\nmax_model_len: 1000\n")
        cases = self.cases(check, path)
        assert set(cases) == set(all_rules())
        assert cases["PD101"] is None
        failure = cases["PD106"]
        assert (failure.tag, failure.get("type")) == ("failure", "error")
        assert failure.get("message").startswith(f"max_model_len ({path}:2:16): ")
        assert "fix: set it to 512 or less" in failure.text
        assert cases["PD111"].tag == "system-out"
        assert cases["PD404"].tag == "skipped"
        assert "needs nixl" in cases["PD404"].get("message")

    def test_warnings_fail_when_strict(self, check, file):
        path = file("kv_transfer: {verify: off}\nload_format: dummy\n")
        cases = self.cases(check, path, "--strict")
        assert (cases["PD111"].tag, cases["PD111"].get("type")) == ("failure", "warning")
        assert cases["PD117"].tag == "system-out"

    def test_unusable_input(self, check, file):
        (error,) = self.cases(check, file("prefil: {}\n")).values()
        assert error.tag == "error"
        assert "did you mean prefill?" in error.text

    def test_characters_that_xml_forbids(self, check, tmp_path):
        case = self.cases(check, "--model", tmp_path / "a\x1b\x01<&>b")["PD103"]
        assert "<&>b" in case.text


@pytest.mark.parametrize(
    ("flag", "shown"),
    [
        ("--no-enable-prefix-caching", "--no-enable-prefix-caching"),
        (None, "PDLAUNCH_ENABLE_PREFIX_CACHING"),
    ],
)
def test_a_switch_is_named_as_it_was_given(check, flag, shown):
    given = [flag] if flag else []
    environ = {} if flag else {"PDLAUNCH_ENABLE_PREFIX_CACHING": "0"}
    output = check("--kv-offload-memory", "2GiB", *given, columns="200", **environ).stdout
    assert f"PD220 enable_prefix_caching ({shown})" in output


def test_exit_codes_are_in_the_help(check):
    text = " ".join(check("--help").stdout.split())
    assert "Exit codes: 0 no errors (with --strict: nor warnings), 1 findings that fail" in text
    assert "2 the input is unusable" in text


class TestMemoryOptions:
    EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def test_the_connector_and_expandable_segments(self, check):
        result = check("--assume-platform", "cuda", columns="300", **self.EXPANDABLE)
        assert result.exit_code == 1
        assert "--enable-cumem-allocator" in result.stdout
        assert "--enable-sleep-mode" in result.stdout

    @pytest.mark.parametrize("flag", ["--enable-cumem-allocator", "--enable-sleep-mode"])
    def test_both_ways_out(self, check, flag):
        assert check("--assume-platform", "cuda", flag, **self.EXPANDABLE).exit_code == 0

    @pytest.mark.parametrize(
        "text",
        [
            "expandable_segments=True",
            "expandable_segments",
            "expandable_segments:",
            "Expandable_Segments:True",
            '"expandable_segments:True"',
            ",expandable_segments:True",
            "expandable_segments:False,,max_split_size_mb:128",
            "max_split_size:128",
            "max_split_size_mb:1",
            "garbage_collection_threshold:2",
            "foo:bar",
        ],
    )
    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_what_torch_refuses_at_start(self, check, file, name, text):
        of_role = file(f"decode: {{env: {{{name}: {json.dumps(text)}}}}}\n")
        for arguments, environ, place in (
            ((), {name: text}, f"environment {name}"),
            ((of_role,), {}, f"decode.env.{name}"),
        ):
            result = check(*arguments, "--assume-platform", "cuda", columns="300", **environ)
            assert result.exit_code == 1
            assert f"PD205 {place}" in result.stdout
            assert check(*arguments, "--device", "cpu", **environ).exit_code == 0

    def test_the_keys_of_cuda_are_known_without_cuda(self, check):
        keys = "backend:native,pinned_num_register_threads:8,release_lock_on_cudamalloc:True"
        assert check("--assume-platform", "cuda", PYTORCH_ALLOC_CONF=keys).exit_code == 0

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

    def test_sleep_mode_without_its_allocator(self, check, file):
        result = check(
            file("enable_sleep_mode: true\nenable_cumem_allocator: false\n"),
            "--assume-platform",
            "cuda",
        )
        assert result.exit_code == 1
        assert "PD201" in result.stdout


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


def test_a_host_that_is_not_resolved_in_time_is_not_checked(check, monkeypatch):
    monkeypatch.setattr(probes, "probe_port", lambda host, port: None)
    result = check()
    assert result.exit_code == 0
    assert "PD420" in result.stdout


@pytest.mark.parametrize("assumed", [False, True])
def test_a_folder_that_cannot_be_written_to_is_found_on_this_machine(check, tmp_path, assumed):
    (tmp_path / "kv").touch()
    folder = ("--kv-connector", "file", "--kv-file-directory", tmp_path / "kv")
    result = check(*folder, *(["--assume-platform", "cpu"] if assumed else []), columns="200")
    assert result.exit_code == (0 if assumed else 1)
    assert ("kv is no folder" in result.stdout) is not assumed
    assert "PD419" in result.stdout


def test_a_folder_of_another_connector_is_of_no_matter(check, tmp_path):
    (tmp_path / "kv").touch()
    assert check("--kv-file-directory", tmp_path / "kv").exit_code == 0


def test_probe_asks_nixl(check, monkeypatch):
    answer = NixlAnswer(import_error="undefined symbol: ucp_init")
    monkeypatch.setattr(module, "ask_nixl", lambda launch: {"prefill": answer})
    result = check("--probe")
    assert result.exit_code == 1
    assert "undefined symbol: ucp_init" in result.stdout


@pytest.mark.parametrize("output", ["table", "json", "github", "sarif", "junit"])
def test_secrets_never_show(check, file, output):
    path = file("api_key: hunter2-key\nenv: {HF_TOKEN: hunter2-token}\nmax_model_len: 1000\n")
    result = check(path, "--format", output, "--strict")
    assert result.exit_code == 1
    assert "hunter2" not in result.output
    result = check(file("api_key: {a: hunter2}\napi_kee: hunter2\n"), "--format", output)
    assert result.exit_code == 2
    assert "hunter2" not in result.output


@pytest.mark.processes
def test_neither_torch_nor_transformers_is_imported(model):
    program = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        f"sys.argv = ['pdlaunch', 'check-config', '--model', {str(model)!r}, '--port', '0'];"
        "from pdlaunch.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not {"torch", "transformers", "nixl"} & set(result.stderr.split())
