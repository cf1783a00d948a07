"""``sleep``, ``wake``, ``restart``, ``drain``, ``undrain``, ``scale`` and ``role`` against a router
that is a function.
"""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from pdlaunch.protocol.process import run_dirs
from tests.command_line import invoke

URL = ("--url", "http://127.0.0.1:1", "--admin-api-key", "of-the-admin")
ENGINES = ("prefill-0", "decode-0")
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


class Router:
    """Answers what ``answers`` says of a path's part, else as a router whose engines all obey."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        for part, answer in self.answers.items():
            if part in path:
                if isinstance(answer, BaseException):
                    raise answer
                return answer
        if body:
            return 200, {"notes": [], "change": CHANGE}
        names = [each.partition("=")[2] for each in path.split("&") if "engine=" in each]
        told = {"is_sleeping": path.startswith("/sleep"), "num_bytes": 3 * 2**30, "running": 0}
        return 200, {"engines": [{"engine": name} | told for name in names or ENGINES]}


@pytest.fixture
def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    made = Router()
    monkeypatch.setattr(Api, "post", lambda _, path, body: made.post(path, body))
    return made


def run(*arguments: str, url: tuple[str, ...] = URL) -> Result:
    return invoke([*arguments, *url], env={"NO_COLOR": "1", "COLUMNS": "200"})


def failed(name: str, message: str, status: int = 409) -> tuple[int, dict[str, Any]]:
    error = {"error": {"message": message}}
    return status, {"engines": [{"engine": name} | error]} | error


def test_sleep_and_wake_show_the_memory_of_each_engine(router: Router) -> None:
    result = run("sleep", "--level", "2", "--mode", "refuse")
    assert result.exit_code == 0
    told = [f"{name} sleeps: 3.00 GiB given back" for name in ENGINES]
    assert result.stdout.splitlines() == told
    assert (
        "decode-0 is awake: 3.00 GiB taken"
        in run("wake", "--tag", "weights", "--engine", "decode-0").stdout
    )
    paths = ["/sleep?level=2&mode=refuse", "/wake_up?tags=weights&engine=decode-0"]
    assert [path for path, _ in router.asked] == paths


def test_restart_takes_one_after_the_other_and_tells_what_fails(router: Router) -> None:
    router.answers["decode-0"] = failed("decode-0", "it is given up again: disk full", 503)
    result = run("restart", "decode-0", "prefill-0", "prefill-0")
    assert result.exit_code == 1
    lines = ["decode-0: it is given up again: disk full", "prefill-0 serves again"]
    assert result.stdout.splitlines() == lines
    assert len(router.asked) == 2


@pytest.mark.parametrize(("timeout", "exit_code"), [("5", 1), ("0", 0)])
def test_drain_tells_what_still_runs(router: Router, timeout: str, exit_code: int) -> None:
    assert run("drain", "decode-1").stdout == "decode-1 gets no new work; nothing runs there\n"
    assert run("undrain", "decode-1").stdout == "decode-1 gets work again\n"
    busy = {"engine": "decode-0", "running": 3, "notes": ["a note"]}
    router.answers["drain?"] = 200, {"engines": [busy]}
    result = run("drain", "decode-0", "--timeout", timeout)
    assert result.exit_code == exit_code
    told = f"decode-0 gets no new work; 3 still at work after {timeout} s"
    assert result.stdout.splitlines() == [told, "  a note"]


def test_scale_shows_what_was_changed(router: Router) -> None:
    result = run("scale", "prefill=2", "decode=1")
    assert result.exit_code == 0
    first, second, *_, last = result.stdout.splitlines()
    assert first == "prefill-1 starts on node-a: cuda:2 cuda:3, 4 threads"
    assert second == "decode-1 stops: 5 running"
    assert last == "The launch is 2 prefill, 1 decode."
    wanted = {"replicas": {"prefill": 2, "decode": 1}, "dry_run": False, "drain_timeout_s": None}
    assert router.asked == [("/pdlaunch/scale", wanted)]


def test_role_and_a_dry_run(router: Router) -> None:
    result = run("role", "decode-1", "prefill", "--dry-run", "--drain-timeout", "5")
    assert result.stdout.splitlines()[-1] == "The launch would be 2 prefill, 1 decode."
    wanted = {"engine": "decode-1", "role": "prefill", "dry_run": True, "drain_timeout_s": 5.0}
    assert router.asked == [("/pdlaunch/role", wanted)]


def test_a_change_that_failed_says_why(router: Router) -> None:
    error = {"message": "prefill-1 cannot be added: no memory"}
    router.answers["scale"] = 409, {"notes": ["PD412 x"], "change": CHANGE, "error": error}
    result = run("scale", "prefill=2")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        "warning: PD412 x",
        "prefill-1 cannot be added: no memory",
    ]


@pytest.mark.parametrize(
    "command",
    [("sleep",), ("wake",), ("drain", "decode-0"), ("scale", "prefill=2"), ("role", "a", "both")],
)
def test_a_refusal_is_shown(router: Router, command: tuple[str, ...]) -> None:
    router.answers["/"] = 400, {"error": {"message": "no\x1b[31m"}}
    result = run(*command)
    assert result.exit_code == 1
    assert r"was refused: no\x1b[31m" in result.stderr
    router.answers["/"] = failed("decode-0", "it is busy")
    if command[0] in ("sleep", "wake", "drain"):
        result = run(*command)
        assert (result.exit_code, "it is busy" in result.stdout) == (1, True)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("drain", "decode-8"), "until `pdlaunch undrain decode-8`"),
        (("scale", "prefill=2"), "the change continues"),
    ],
)
def test_ctrl_c_says_what_stays(router: Router, command: tuple[str, ...], words: str) -> None:
    router.answers["/"] = KeyboardInterrupt()
    result = run(*command)
    assert result.exit_code == 130
    assert words in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("scale", "prefill=-1"),
        ("scale", "router=2"),
        ("scale", "prefill=1", "prefill=2"),
        ("role", "decode-1", "router"),
        ("drain", "decode-0", "--timeout", "9000"),
        ("restart",),
    ],
)
def test_a_wrong_command_asks_nothing(router: Router, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert not router.asked


def test_which_launch_is_meant_must_be_clear(router: Router) -> None:
    assert "no launch of yours runs here" in run("sleep", url=()).stderr
    assert "is not the URL of a deployment" in run("sleep", url=("--url", "host")).stderr
    router.answers["/"] = PdlaunchError("/sleep cannot be reached: Connection refused")
    assert "cannot be reached" in run("sleep").stderr
