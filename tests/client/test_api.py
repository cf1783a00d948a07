"""Calls of a deployment, and whom the key of a command is sent to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pdlaunch.client.api import Api
from pdlaunch.errors import PdlaunchError


@contextmanager
def serving(location: str = "") -> Iterator[tuple[str, list[str | None]]]:
    """Yield the URL of a server, and the keys that it is sent; it may lead elsewhere."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(302 if location else 200)
            self.send_header("Location", location)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", keys
        finally:
            server.shutdown()
            thread.join()


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with serving() as (elsewhere, told), serving(elsewhere) as (url, keys):
        api = Api(url, "key-of-a-command", 10.0)
        assert api.get("/pdlaunch/status") == (302, "{}")
        assert api.post("/sleep", {})[0] == 302
        assert (len(keys), told) == (2, [])


def test_a_call_has_its_key_and_one_to_nobody_says_so() -> None:
    with serving() as (url, keys):
        assert Api(url, "mine", 10.0).get_object("/pdlaunch/status") == (200, {})
        assert keys == ["Bearer mine"]
    with pytest.raises(PdlaunchError, match="/pdlaunch/status cannot be reached"):
        Api(url, "mine", 10.0).get("/pdlaunch/status")
