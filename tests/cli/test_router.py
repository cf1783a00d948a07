"""``pdlaunch router`` and what it refuses before it listens; real engines: tests/e2e/test_doors."""

from pathlib import Path
from typing import Any

import pytest

from tests.command_line import invoke


def run(*arguments: str, **environ: str) -> Any:
    return invoke(list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", **environ})


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        (("--prefill", "10.0.0.1:8000"), "engines", "is not the URL of an engine"),
        (("--prefill", "http://u:pw@10.0.0.1"), "engines", "name the key's variable"),
        (
            ("--prefill", "http://a:1", "--decode", "http://a:1"),
            "engines",
            "two engines have the url http://a:1",
        ),
        (
            ("--prefill", "http://a:1", "--engine-key-env", "NOT_SET"),
            "engines",
            "NOT_SET is not set, or empty",
        ),
        (("--engines-file", "/nowhere.yaml"), "/nowhere.yaml", "no such file"),
        (("--prefill", "unix:/nowhere/x.sock"), "served_model_name", "no engine reports"),
        ((), "served_model_name", "no engine is named by its URL"),
        (("llama",), "llama", "is not a deployment file"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_started(
    arguments: tuple[str, ...], field: str, message: str
) -> None:
    result = run("router", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert field in result.output
    assert "pw" not in result.output


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize("line", ["engines: ['prefill=http://a:1']", "engines_file: x.yaml"])
def test_a_launch_has_none_of_them(tmp_path: Path, command: str, line: str) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text(f"{line}\n")
    result = run(command, str(file))
    assert result.exit_code == 2
    assert "running engines cannot be part of a launch" in result.output
    assert "pdlaunch router" in result.output


def test_help_has_the_flags_of_a_router_alone() -> None:
    text = run("router", "--help").output
    assert "--engines-file" in text
    assert "--served-model-name" in text
    assert "--tensor-parallel-size" not in text
    assert "--engines-file" not in run("serve", "--help").output
