"""The forms in which check-config answers: table, json, sarif."""

import json
import re

import pytest

ALL_SEVERITIES = "kv_transfer: {verify: off}\nmax_model_len: 1000\nload_format: dummy\n"
TOO_LONG = "decode:\n  max_model_len: 1000\n"


def test_json(check, file):
    report = json.loads(check(file(TOO_LONG), "--format", "json").stdout)
    assert list(report) == ["ok", "findings", "resolved"]
    assert report["ok"] is False
    finding = next(finding for finding in report["findings"] if finding["rule"] == "PD106")
    assert list(finding) == ["rule", "severity", "where", "message", "fix"]
    assert finding["severity"] == "error"
    assert finding["where"].startswith("decode.max_model_len (")
    assert finding["where"].endswith("deploy.yaml:2:18)")
    assert report["resolved"]["engines"]["prefill"]["max_model_len"] == 512
    result = check(file("prefil: {}\n"), "--format", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"], report["resolved"]) == (2, False, {})
    assert report["findings"][0]["message"] == "prefil: unknown field"
    assert report["findings"][0]["fix"] == "did you mean prefill?"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_table_is_grouped_by_severity_at_any_width(check, file, columns):
    lines = check(file(ALL_SEVERITIES), columns=columns).stdout.splitlines()
    headings = ("error", "errors", "warning", "info", "not checked")
    assert [line for line in lines if line in headings] == ["error", "warning", "info"]
    text = " ".join(" ".join(lines).split())
    assert "not ok: 1 error, 1 warning, 1 info" in text
    assert "fix: set it to 512 or less, or leave it out" in text
    assert "pdlaunch explain PD106" in text
    assert max(map(len, lines)) <= int(columns)


def test_a_clean_table_is_one_line(check):
    (line,) = check().stdout.splitlines()
    assert re.fullmatch(r"ok: no findings; not checked before a start: PD503 and \d+ more", line)
    assert len(line) <= 80


def test_a_table_names_facts_that_are_missing(check):
    lines = check("--assume", "h100x8", columns="200").stdout.splitlines()
    assert lines[0] == "not checked"
    assert "  PD416 needs shm: profile h100x8 does not say" in lines
    assert "  PD119 needs weights: files of weights were not looked at" in lines
    assert lines[-2].startswith("for h100x8: 8 x H100 SXM5 80 GB in a DGX H100; taken for")
    assert lines[-1] == "ok: no findings"


def test_lines_of_a_pipe_are_whole(check, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    output = check("--kv-offload-memory", "4TiB", columns=None).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("  PD212")]
    assert len(line) > 80
    assert line.endswith("64 GiB")
    assert "\x1b" not in output


def sarif(check, *arguments):
    log = json.loads(check(*arguments, "--format", "sarif").stdout)
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    return run


def test_sarif_has_what_the_standard_requires(check, file):
    run = sarif(check, file(ALL_SEVERITIES), "--assume", "h100x8")
    driver = run["tool"]["driver"]
    assert driver["name"]
    rules = driver["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for rule in rules:
        for part in ("shortDescription", "fullDescription", "help"):
            assert rule[part]["text"]
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
    (invocation,) = run["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (True, 1)


def test_sarif_points_at_the_line(check, file, tmp_path, monkeypatch):
    path = file(TOO_LONG)
    (result, *_) = sarif(check, path)["results"]
    assert (result["ruleId"], result["level"]) == ("PD106", "error")
    (location,) = result["locations"]
    place = location["physicalLocation"]
    assert place["artifactLocation"]["uri"] == path.as_uri()
    assert place["region"] == {"startLine": 2, "startColumn": 18}
    assert location["logicalLocations"] == [{"fullyQualifiedName": "decode.max_model_len"}]
    # A relative path stays relative.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my deploy%.yaml").write_text("load_format: dummy\n")
    (result,) = sarif(check, "my deploy%.yaml")["results"]
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "my%20deploy%25.yaml"}
    assert result["level"] == "note"


def test_sarif_of_unusable_input(check, file):
    run = sarif(check, file("port: [\n"))
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("input", "error")
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 2
    assert run["invocations"][0]["executionSuccessful"] is False
    assert run["invocations"][0]["exitCode"] == 2


@pytest.mark.parametrize("output", ["table", "json", "sarif"])
def test_no_form_shows_a_secret(check, file, output):
    path = file("api_key: hunter2-key\nenv: {HF_TOKEN: hunter2-token}\nmax_model_len: 1000\n")
    result = check(path, "--format", output, "--strict")
    assert result.exit_code == 1
    assert "hunter2" not in result.output
    result = check(file("api_key: {a: hunter2}\napi_kee: hunter2\n"), "--format", output)
    assert result.exit_code == 2
    assert "hunter2" not in result.output
