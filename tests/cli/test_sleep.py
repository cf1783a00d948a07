"""``pdlaunch sleep`` and ``wake`` against HTTP servers that answer as router and engines do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app

GIB = 1024**3


class Deployment:
    """One server that is router and both engines, by path prefix."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refusal: str | None = None
        deployment = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                names = ("decode-0", "prefill-0")
                engines = [
                    {"name": name, "role": name.split("-")[0], "url": f"{deployment.url}/{name}", "state": "ready"}
                    for name in names
                ]
                self.answer(200, {"engines": engines})

            def do_POST(self) -> None:
                deployment.calls.append(self.path)
                if deployment.refusal and self.path.startswith("/prefill-0"):
                    self.answer(409, {"error": {"message": deployment.refusal}})
                else:
                    sleeping = "/sleep" in self.path
                    self.answer(200, {"is_sleeping": sleeping, "sleeping_tags": [], "num_bytes": 3 * GIB})

            def answer(self, status: int, body: dict) -> None:
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
def deployment() -> Iterator[Deployment]:
    deployment = Deployment()
    thread = threading.Thread(target=deployment.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield deployment
    deployment.server.shutdown()
    thread.join()
    deployment.server.server_close()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(arguments), arguments)
    return result.exit_code, result.output


def test_prefill_sleeps_first_and_decode_wakes_first(deployment: Deployment) -> None:
    code, output = run("sleep", "--url", deployment.url, "--level", "2", "--mode", "refuse")
    assert code == 0
    assert "3.00 GiB" in output
    assert "sleeping" in output
    code, output = run("wake", "--url", deployment.url, "--tag", "weights", "--tag", "kv_cache")
    assert code == 0
    assert "awake" in output
    assert deployment.calls == [
        "/prefill-0/sleep?level=2&mode=refuse",
        "/decode-0/sleep?level=2&mode=refuse",
        "/decode-0/wake_up?tags=weights,kv_cache",
        "/prefill-0/wake_up?tags=weights,kv_cache",
    ]


def test_one_engine_alone(deployment: Deployment) -> None:
    assert run("sleep", "--url", deployment.url, "--engine", "decode-0")[0] == 0
    assert deployment.calls == ["/decode-0/sleep?level=1&mode=wait"]
    code, output = run("sleep", "--url", deployment.url, "--engine", "decode-7")
    assert code == 1
    assert "has no engine decode-7" in output


def test_a_refusal_is_shown_and_fails(deployment: Deployment) -> None:
    deployment.refusal = "enable_sleep_mode is off"
    code, output = run("sleep", "--url", deployment.url)
    assert code == 1
    assert "enable_sleep_mode is off" in output


def test_nobody_there() -> None:
    code, output = run("wake", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert output == "error: http://127.0.0.1:1/pdlaunch/status cannot be reached: Connection refused\n"


def test_no_url() -> None:
    assert run("sleep", "--url", "localhost:8000") == (
        1,
        "error: localhost:8000 is no URL of a deployment; write http://host:port\n",
    )
