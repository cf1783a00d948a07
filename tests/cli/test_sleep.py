"""``pdlaunch sleep`` and ``wake`` against an HTTP server that answers as a router does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pdlaunch.protocol.process import run_dirs
from pdlaunch.protocol.process.run_dirs import LaunchCard, new_run_dir
from tests.command_line import invoke

GIB = 1024**3
ENGINES = ("prefill-0", "decode-0")


@pytest.fixture(autouse=True)
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the launches of this user are looked for."""
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    return tmp_path


class Router:
    """Takes commands over TCP."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.refusal: str | None = None
        self.page: bytes | None = None
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                router.calls.append((self.path, self.headers["Authorization"]))
                sleeping = self.path.startswith("/sleep")
                outcome = {"is_sleeping": sleeping, "sleeping_tags": [], "num_bytes": 3 * GIB}
                engines: list[dict[str, object]] = [{"engine": name} | outcome for name in ENGINES]
                error = {"error": {"message": router.refusal}}
                if "engine=decode-7" in self.path:
                    self.answer(404, {"error": {"message": "there is no engine decode-7"}})
                elif router.refusal:
                    self.answer(
                        409, {"engines": [{"engine": "prefill-0"} | error, engines[1]]} | error
                    )
                else:
                    self.answer(200, {"engines": engines})

            def answer(self, status: int, body: dict[str, object]) -> None:
                payload = router.page or json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.address = ("--url", self.url, "--admin-api-key", "of-the-admin")


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    thread = threading.Thread(target=router.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield router
    router.server.shutdown()
    thread.join()
    router.server.server_close()


def run(*arguments: str, **environ: str) -> tuple[int, str]:
    result = invoke(arguments, env=environ)
    return result.exit_code, result.output


def test_all_engines_of_a_router_whose_key_is_known(router: Router) -> None:
    code, output = run("sleep", *router.address, "--level", "2", "--mode", "refuse")
    assert code == 0
    assert "3.00 GiB" in output
    assert "sleeping" in output
    code, output = run(
        "wake",
        "--url",
        router.url,
        "--tag",
        "weights",
        "--tag",
        "kv_cache",
        PDLAUNCH_ADMIN_API_KEY="of-the-admin",
    )
    assert code == 0
    assert "awake" in output
    assert router.calls == [
        ("/sleep?level=2&mode=refuse", "Bearer of-the-admin"),
        ("/wake_up?tags=weights&tags=kv_cache", "Bearer of-the-admin"),
    ]


def test_engines_by_name(router: Router) -> None:
    assert run("sleep", *router.address, "--engine", "decode-0", "--engine", "prefill-0")[0] == 0
    assert router.calls[0][0] == "/sleep?level=1&mode=wait&engine=decode-0&engine=prefill-0"
    code, output = run("sleep", *router.address, "--engine", "decode-7")
    assert code == 1
    assert "there is no engine decode-7" in output


def test_a_refusal_is_shown_beside_what_the_others_say_and_fails(router: Router) -> None:
    router.refusal = "enable_sleep_mode is off"
    code, output = run("sleep", *router.address)
    assert code == 1
    assert "enable_sleep_mode is off" in output
    assert "3.00 GiB" in output


def test_what_a_router_answers_tells_a_terminal_nothing(router: Router) -> None:
    router.refusal = "[red]no\x1b[2J\x9b31m"
    _, output = run("sleep", *router.address)
    assert "\x1b" not in output
    assert "\x9b" not in output
    assert r"[red]no\x1b[2J\x9b31m" in output


def test_a_server_of_another_kind_is_named(router: Router) -> None:
    router.page = b"<html>"
    code, output = run("wake", *router.address)
    assert code == 1
    said = "answers HTTP 200, but not as a deployment of pdlaunch does: it is no JSON"
    assert output == f"error: {router.url}/wake_up {said}\n"


def test_nobody_there() -> None:
    assert run("wake", "--url", "http://127.0.0.1:1", "--admin-api-key", "x") == (
        1,
        "error: http://127.0.0.1:1/wake_up cannot be reached: Connection refused\n",
    )


def test_no_url() -> None:
    assert run("sleep", "--url", "localhost:8000") == (
        1,
        "error: localhost:8000 is no URL of a deployment; write http://host:port\n",
    )


@pytest.mark.parametrize("command", ["sleep", "wake"])
def test_which_launch_is_meant_must_be_clear(command: str, launches: Path) -> None:
    code, output = run(command)
    assert code == 1
    assert "no launch of yours runs here" in output
    with new_run_dir(launches) as first, new_run_dir(launches) as second:
        for run_dir, port in ((first, 1), (second, 2)):
            LaunchCard(launch_id="id", url=f"http://127.0.0.1:{port}").write(run_dir)
        code, output = run(command)
        assert code == 1
        assert "choose one with --url: http://127.0.0.1:1, http://127.0.0.1:2" in output
        code, output = run(command, "--url", "http://localhost:2")
        assert code == 1
        assert f"at {second}/admin.sock cannot be reached" in output
