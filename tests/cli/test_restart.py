"""``pdlaunch restart`` against an HTTP server that answers as a router does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import Result

from pdlaunch.protocol.process import run_dirs
from tests.command_line import invoke

ENGINES = ("prefill-0", "decode-0")


@pytest.fixture(autouse=True)
def _no_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)


class Router:
    """Knows two engines; decode-0 cannot be restarted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], str | None]] = []
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                parts = urlsplit(self.path)
                names = parse_qs(parts.query)["engine"]
                router.calls.append((parts.path, names, self.headers["Authorization"]))
                engine = names[0].partition("/")[0]
                if engine == "prefill-0":
                    self.answer(200, {"engines": [{"engine": engine, "incarnation": 2}]})
                elif engine == "decode-0":
                    error = {"error": {"message": "decode-0 is given up again: disk full"}}
                    self.answer(503, {"engines": [{"engine": engine} | error]} | error)
                else:
                    self.answer(
                        404,
                        {
                            "error": {
                                "message": (
                                    f"there is no engine {engine}; there are: prefill-0, decode-0"
                                )
                            }
                        },
                    )

            def answer(self, status: int, body: dict[str, object]) -> None:
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    thread = threading.Thread(target=router.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield router
    router.server.shutdown()
    thread.join()
    router.server.server_close()


def run(*arguments: str) -> Result:
    command = ["restart", *arguments]
    return invoke(command, env={"NO_COLOR": "1"})


def test_it_says_when_the_engine_serves_again(router: Router) -> None:
    result = run("prefill-0/rank-0", "--url", router.url, "--admin-api-key", "of-the-admin")
    assert (result.exit_code, result.stdout) == (0, "prefill-0 serves again\n")
    assert router.calls == [("/pdlaunch/restart", ["prefill-0/rank-0"], "Bearer of-the-admin")]


def test_one_after_the_other_and_what_fails_is_told(router: Router) -> None:
    names = ["decode-7", "decode-0", "prefill-0", "prefill-0"]
    result = run(*names, "--url", router.url, "--admin-api-key", "of-the-admin")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "decode-7: there is no engine decode-7; there are: prefill-0, decode-0",
        "decode-0: decode-0 is given up again: disk full",
        "prefill-0 serves again",
    ]
    assert len(router.calls) == 3


def test_without_a_name_nothing_happens(router: Router) -> None:
    assert run("--url", router.url).exit_code == 2
    assert not router.calls


def test_a_launch_that_is_not_there_is_named() -> None:
    result = run("decode-0")
    assert result.exit_code == 1
    assert "no launch of yours runs here" in result.stderr
