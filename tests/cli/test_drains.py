"""``pdlaunch drain`` and ``undrain``; the deployment is a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from pdlaunch.launch.client.api import Api
from pdlaunch.protocol.process import run_dirs
from tests.command_line import invoke

URL = ("--url", "http://127.0.0.1:1", "--admin-api-key", "of-the-admin")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were asked; decode-0 has work, decode-7 is not there."""
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    paths: list[str] = []

    def post(api: Api, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        paths.append(path)
        if "decode-8" in path:
            raise KeyboardInterrupt
        if "engine=decode-7" in path:
            error = {"error": {"message": "there is no engine decode-7; there are: decode-0"}}
            return 404, {"engines": [{"engine": "decode-7"} | error]} | error
        running = 3 if "engine=decode-0" in path else 0
        name = path.rpartition("=")[2]
        engine = {"engine": name, "is_drained": True, "notes": ["a note"], "running": running}
        return 200, {"engines": [engine]}

    monkeypatch.setattr(Api, "post", post)
    return paths


def run(*arguments: str) -> Result:
    return invoke([*arguments, *URL], env={"NO_COLOR": "1", "COLUMNS": "200"})


def test_an_idle_engine_is_drained(calls: list[str]) -> None:
    result = run("drain", "decode-1")
    assert (result.exit_code, result.stdout) == (
        0,
        "decode-1 is given no new work; nothing runs there\n  a note\n",
    )
    assert calls == ["/pdlaunch/drain?timeout_s=600&engine=decode-1"]


@pytest.mark.parametrize(("timeout", "exit_code"), [("5", 1), ("0", 0)])
def test_work_that_is_left_is_told(calls: list[str], timeout: str, exit_code: int) -> None:
    result = run("drain", "decode-0", "--timeout", timeout)
    assert result.exit_code == exit_code
    assert (
        result.stdout.splitlines()[0]
        == f"decode-0 is given no new work; 3 still at work after {timeout} s"
    )


def test_undrain(calls: list[str]) -> None:
    result = run("undrain", "decode-1")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "decode-1 is given work")
    assert calls == ["/pdlaunch/undrain?engine=decode-1"]


def test_a_refusal_is_shown(calls: list[str]) -> None:
    result = run("drain", "decode-7")
    assert (result.exit_code, result.stdout) == (
        1,
        "decode-7: there is no engine decode-7; there are: decode-0\n",
    )


def test_ctrl_c_leaves_it_drained_and_says_so(calls: list[str]) -> None:
    result = run("drain", "decode-8")
    assert result.exit_code == 130
    assert "`pdlaunch undrain decode-8` ends that" in result.stderr


@pytest.mark.parametrize("arguments", [("drain",), ("drain", "decode-0", "--timeout", "9000")])
def test_a_wrong_command_asks_nothing(calls: list[str], arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert not calls
