"""``check-config``, ``--assume`` and ``explain``: what they find, how they say it, exit codes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import Result

from pdlaunch.checks import probed
from pdlaunch.checks.run import all_rules
from pdlaunch.config.settings import all_flags
from pdlaunch.machine import network
from pdlaunch.machine.profiles import PROFILES
from tests.command_line import invoke
from tests.config.model_files.files import EMPTY_SAFETENSORS
from tests.launch.engines.test_vllm import installed

ALL_SEVERITIES = "decode: {max_model_len: 1000}\nkv_transfer: {verify: off}\nload_format: dummy\n"
Check = Callable[..., Result]
File = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "strictly"), [("", 0), ("kv_transfer: {verify: off}", 1), ("load_format: dummy", 0)]
)
def test_warnings_fail_only_when_strict(check: Check, file: File, text: str, strictly: int) -> None:
    assert check(file(text)).exit_code == 0
    assert check(file(text), "--strict").exit_code == strictly


@pytest.mark.parametrize("text", ["a: [", "prefil: {}", "port: x", "- 1"])
def test_an_unusable_file_is_told_with_its_place(check: Check, file: File, text: str) -> None:
    result = check(file(text))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "deploy.yaml:1:" in result.stderr or "deploy.yaml:2:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--assume", "h100x0"), "h100x0"),
        (("--assume", "cpu", "--probe"), "--probe measures this machine"),
        (("--port", "x"), "--port"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--format", "xml"), "xml"),
    ],
)
def test_unusable_flags(check: Check, arguments: tuple[str, ...], said: str) -> None:
    result = check(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_weights_that_are_cut_off_or_missing(check: Check, model: Path) -> None:
    (model / "model.safetensors").write_bytes(EMPTY_SAFETENSORS[:9])
    assert "model.safetensors is damaged: it is cut off" in check(columns="200").stdout
    (model / "model.safetensors").unlink()
    assert "has no model*.safetensors" in check(columns="200").stdout
    # Nobody reads the weights of dummies, or of another machine.
    assert check(PDLAUNCH_LOAD_FORMAT="dummy").exit_code == 0
    assert check("--assume", "cpu").exit_code == 0


def test_busy_ports_are_named(check: Check, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {9000: "it is busy", 9101: "it is busy", 8000: network.NOT_HERE}
    monkeypatch.setattr(probed, "probe_port", lambda host, port: problems.get(port, ""))
    assert "PD420 host" in check().stdout
    result = check("--port", 9000)
    assert result.exit_code == 1
    assert "PD420 port (--port)  port 9000" in result.stdout
    path = file("engine_api_key: k\ndecode: {port: 9100, replicas: 2}\n")
    result = check(path, columns="200")
    assert result.exit_code == 1
    assert (
        "port 9101 of 127.0.0.1 for the server of decode-1 cannot be used: it is busy"
        in result.stdout
    )


def test_json(check: Check, file: File) -> None:
    report = json.loads(check(file(ALL_SEVERITIES), "--format", "json").stdout)
    assert list(report) == ["ok", "findings", "resolved"]
    assert report["ok"] is False
    finding = report["findings"][0]
    assert list(finding) == ["rule", "severity", "where", "message", "fix"]
    severities = [finding["severity"] for finding in report["findings"]]
    assert severities == ["error", "warning", "info"]
    assert re.fullmatch(r"decode\.max_model_len \(.*deploy\.yaml:1:25\)", finding["where"])
    prefill = report["resolved"]["engines"]["prefill"]
    assert prefill["max_model_len"] == 512
    assert prefill["memory_of_a_rank"]["blocks_for_longest_request"] == 32
    result = check(file("prefil: {}\n"), "--format", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"], report["resolved"]) == (2, False, {})
    assert report["findings"][0]["message"] == "prefil: unknown field"
    assert report["findings"][0]["fix"] == "did you mean prefill?"


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_table_is_grouped_by_severity_at_any_width(
    check: Check, file: File, columns: str
) -> None:
    lines = check(file(ALL_SEVERITIES), columns=columns).stdout.splitlines()
    headings = ("error", "errors", "warning", "info", "not checked")
    assert [line for line in lines if line in headings] == ["error", "warning", "info"]
    text = " ".join(" ".join(lines).split())
    assert "not ok: 1 error, 1 warning, 1 info" in text
    assert "fix: set it to 512 or less, or leave it out" in text
    assert "pdlaunch explain PD106" in text
    assert max(map(len, lines)) <= int(columns)


def test_a_table_says_what_was_not_checked(check: Check) -> None:
    assert check().stdout == "ok: no findings\n"
    lines = check("--assume", "h100x8", columns="200").stdout.splitlines()
    assert lines[0] == "not checked"
    assert "  PD416 needs shm: profile h100x8 does not say" in lines
    assert lines[-2].startswith("for h100x8: 8 x H100 SXM5 80 GB in a DGX H100; taken for")
    assert lines[-1] == "ok: no findings"


@pytest.mark.processes
def test_a_probe_measures_the_pair_and_hands_it_to_the_rules(check: Check) -> None:
    resolved = json.loads(check("--probe", "--format", "json").stdout)["resolved"]
    assert "PD504" not in [item["rule"] for item in resolved["not_checked"]]
    measured = resolved["measured"]
    assert measured.startswith("measured: prefill-0/rank-0 → decode-0/rank-0: ")
    assert set(re.findall(r"nixl/UCX|p2p/memfd", measured)) == {"nixl/UCX", "p2p/memfd"}
    assert re.search(r"nixl/UCX \((cma|posix)\)", measured)
    assert len(re.findall(r"[\d.]+ GB/s", measured)) == 2


def test_a_probe_says_why_it_measures_nothing(check: Check, file: File, model: Path) -> None:
    command = installed(model / "one", "0.32.0")
    path = file(f"engine_command: {command}\nengine: vllm\nkv_transfer: {{connector: vllm-nixl}}\n")
    assert "vllm-nixl, so only a start can" in check(path, "--probe", columns="200").stdout
    assert "correct the errors first" in check("--probe", "--max-model-len", "1000").stdout


def test_lines_of_a_pipe_are_whole(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    output = check("--kv-offload-memory", "4TiB", columns=None).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("  PD212")]
    assert len(line) > 80
    assert line.endswith("64 GiB")
    assert "\x1b" not in output


@pytest.mark.parametrize("output", ["table", "json"])
def test_no_form_shows_a_secret(check: Check, file: File, output: str) -> None:
    path = file("api_key: hunter2-key\nenv: {HF_TOKEN: hunter2-token}\nmax_model_len: 1000\n")
    result = check(path, "--format", output, "--strict", PDLAUNCH_ENGINE_API_KEY="hunter2")
    assert result.exit_code == 1
    assert "hunter2" not in result.output
    result = check(file("api_key: {a: hunter2}\napi_kee: hunter2\n"), "--format", output)
    assert result.exit_code == 2
    assert "hunter2" not in result.output


@pytest.mark.parametrize("name", [*PROFILES, "h100x2"])
@pytest.mark.parametrize("command", [("check-config",), ("serve", "--dry-run")])
def test_every_profile_works_with_every_command(
    check: Check, name: str, command: tuple[str, ...]
) -> None:
    result = invoke([*command, "--assume", name])
    assert result.exit_code == 0, result.output


def test_the_plan_and_the_settings_are_those_of_the_machine(check: Check) -> None:
    arguments = ("--format", "json", "--assume", "h200x2")
    plan = json.loads(invoke(["serve", "--dry-run", *arguments]).stdout)
    assert plan["engines"]["decode"]["device"] == "cuda"
    assert [process["devices"] for process in plan["processes"][:2]] == [["cuda:0"], ["cuda:1"]]
    assert "add --dry-run" in invoke(["serve", "--assume", "h100x8"]).stderr


def test_a_model_that_is_not_here_is_not_checked(check: Check, model: Path) -> None:
    result = check("--assume", "h100x8", "--model", "/models/llama", "--format", "json")
    assert result.exit_code == 0
    not_checked = json.loads(result.stdout)["resolved"]["not_checked"]
    reasons = {item["rule"]: item["reason"] for item in not_checked}
    assert "/models/llama" in reasons["PD103"]
    assert check("--model", "/models/llama").exit_code == 1


def test_of_a_model_that_native_engines_cannot_serve_vllm_is_told_what_was_not_checked(
    check: Check, model: Path
) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "mamba", "state_size": 16}))
    command = installed(model / "one", "0.32.0")
    report = json.loads(check("--engine-command", command, "--format", "json").stdout)
    assert not report["findings"]
    unchecked = {item["rule"]: item["reason"] for item in report["resolved"]["not_checked"]}
    assert "native engines cannot serve it" in unchecked["PD104"]


def test_explain_shows_a_rule_or_all() -> None:
    rule = all_rules()["PD204"]
    text = " ".join(invoke(["explain", "pd204"], env={"COLUMNS": "80"}).stdout.split())
    for part in (rule.title, rule.why, rule.fix, rule.source):
        assert part in text
    assert all(code in invoke(["explain"]).stdout for code in all_rules())
    unknown = invoke(["explain", "PD2O4"])
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "did you mean PD204?" in unknown.stderr


# Whatever is given: an exit code of 0, 1 or 2 and a message, never a traceback.
WORDS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
FLAGS = st.lists(
    st.tuples(
        st.sampled_from(sorted(flag.name for flag in all_flags().values())),
        st.one_of(WORDS, st.integers().map(str)),
    ).map(lambda pair: [f"--{pair[0]}", pair[1]]),
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(flags=FLAGS)
def test_any_flags(flags: list[list[str]]) -> None:
    for command in (["check-config", "--port", "0"], ["check-config", "--format", "json"]):
        result = invoke([*command, *(word for flag in flags for word in flag)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert result.exit_code in (0, 1, 2)
        assert result.exit_code != 2 or result.stderr.strip()
