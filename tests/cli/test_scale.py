"""``pdlaunch scale`` and ``role``; the deployment is a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pdlaunch.cli.app import build_app
from pdlaunch.launch.client.api import Api
from pdlaunch.protocol.process import run_dirs

URL = ("--url", "http://127.0.0.1:1", "--admin-api-key", "of-the-admin")
CHANGE = {
    "replicas": {"prefill": 2, "decode": 1, "both": 0},
    "starts": [
        {
            "name": "prefill-1",
            "role": "prefill",
            "host": "node-a",
            "devices": ["cuda:2", "cuda:3"],
            "num_threads": 4,
        }
    ],
    "stops": {"decode-1": 5},
    "stops_first": True,
    "drain_s": 30.0,
}


class Deployment:
    """Answers as a router does."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: tuple[int, dict[str, Any]] = (200, {"notes": [], "change": CHANGE})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        if not self.answer[1]:
            raise KeyboardInterrupt
        return self.answer


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    made = Deployment()
    monkeypatch.setattr(Api, "post", lambda _, path, body: made.post(path, body))
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(
        build_app(arguments), [*arguments, *URL], env={"NO_COLOR": "1", "COLUMNS": "200"}
    )


def test_scale_shows_what_was_changed(deployment: Deployment) -> None:
    result = run("scale", "prefill=2", "decode=1")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    cells = [" ".join(row) for row in rows]
    assert any("prefill-1 │ starts │ node-a │ cuda:2 cuda:3 │ 4" in row for row in cells)
    assert any("decode-1" in row and "stops" in row and row.endswith("│ 5 │") for row in cells)
    assert cells[-2:] == [
        "What stops does so before others start; what runs there gets up to 30 s, then it goes on "
        "elsewhere.",
        "The launch is 2 prefill, 1 decode.",
    ]
    assert deployment.asked == [
        (
            "/pdlaunch/scale",
            {"prefill": 2, "decode": 1, "dry_run": False, "drain_timeout_s": None},
        )
    ]


def test_role_and_a_dry_run(deployment: Deployment) -> None:
    result = run("role", "decode-1", "prefill", "--dry-run", "--drain-timeout", "5")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "The launch would be 2 prefill, 1 decode."
    assert deployment.asked == [
        (
            "/pdlaunch/role",
            {"engine": "decode-1", "role": "prefill", "dry_run": True, "drain_timeout_s": 5.0},
        )
    ]


def test_a_change_that_failed_says_why(deployment: Deployment) -> None:
    error = {"message": "prefill-1 cannot be added: no memory"}
    deployment.answer = (409, {"notes": ["PD412 x"], "change": CHANGE, "error": error})
    result = run("scale", "prefill=2")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == ["PD412 x", "prefill-1 cannot be added: no memory"]


def test_a_refusal_is_shown(deployment: Deployment) -> None:
    deployment.answer = (400, {"error": {"message": "no"}})
    result = run("scale", "prefill=2")
    assert result.exit_code == 1
    assert "scale was refused: no" in result.stderr


def test_ctrl_c_says_that_it_goes_on(deployment: Deployment) -> None:
    deployment.answer = (0, {})
    result = run("scale", "prefill=2")
    assert result.exit_code == 130
    assert "what has begun goes on" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("scale",),
        ("scale", "prefill"),
        ("scale", "prefill=-1"),
        ("scale", "prefill=two"),
        ("scale", "router=2"),
        ("scale", "prefill=1", "prefill=2"),
        ("role", "decode-1"),
        ("role", "decode-1", "router"),
    ],
)
def test_a_wrong_command_asks_nothing(deployment: Deployment, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert not deployment.asked
