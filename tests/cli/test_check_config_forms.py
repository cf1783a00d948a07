"""The forms in which check-config answers: table, json, github, sarif, junit."""

import json
import re
from xml.etree import ElementTree

import pytest

from pdlaunch.launch.engines.native import NativeEngine


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

    def test_unusable_input_too(self, check, file):
        result = check(file("prefil: {}\n"), "--format", "json")
        report = json.loads(result.stdout)
        assert (result.exit_code, report["ok"], report["resolved"]) == (2, False, {})
        assert report["findings"][0]["message"] == "prefil: unknown field"
        assert report["findings"][0]["fix"] == "did you mean prefill?"


class TestGithub:
    def test_annotations_point_at_the_line(self, check, file):
        path = file("decode:\n  max_model_len: 1000\n")
        (line, *_) = check(path, "--format", "github").stdout.splitlines()
        assert line.startswith(
            f"::error file={path},line=2,col=18,title=PD106::decode.max_model_len: "
        )

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
        assert unchecked.endswith("to PD506: only with --probe")


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

    def test_a_clean_run_is_one_line(self, check):
        (line,) = check().stdout.splitlines()
        assert re.fullmatch(
            r"ok: no findings; not checked without --probe: PD404 and \d+ more", line
        )
        assert len(line) <= 80

    def test_facts_that_are_missing_are_named(self, check):
        lines = check("--assume", "h100x8", columns="200").stdout.splitlines()
        assert lines[0] == "not checked"
        assert "  PD416 needs shm: profile h100x8 does not say" in lines
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

    def test_rules_that_were_not_checked_are_notes(self, check):
        run = self.log(check, "--assume", "h100x8")
        notes = {
            note["associatedRule"]["id"]: note["message"]["text"]
            for note in run["invocations"][0]["toolExecutionNotifications"]
        }
        assert notes["PD416"] == "not checked: needs shm: profile h100x8 does not say"
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
        assert set(cases) == {rule.code for rule in NativeEngine().rules()}
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


@pytest.mark.parametrize("output", ["table", "json", "github", "sarif", "junit"])
def test_secrets_never_show(check, file, output):
    path = file("api_key: hunter2-key\nenv: {HF_TOKEN: hunter2-token}\nmax_model_len: 1000\n")
    result = check(path, "--format", output, "--strict")
    assert result.exit_code == 1
    assert "hunter2" not in result.output
    result = check(file("api_key: {a: hunter2}\napi_kee: hunter2\n"), "--format", output)
    assert result.exit_code == 2
    assert "hunter2" not in result.output
