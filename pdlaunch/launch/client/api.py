"""Calls a router or an engine synchronously, for commands and tests.

The size of answers is limited, because the server may be any program. Redirects are not followed,
so no other server gets the key, and proxy variables are ignored. ``http.client`` avoids the 0.15 s
that importing aiohttp adds to every command.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdlaunch.errors import PdlaunchError

MAX_ANSWER_BYTES = 64 << 20
# Time in which a launch replaces a dead router, unless its routers die repeatedly
ROUTER_RETURN_S = 20.0
_POLL_S = 0.05
_NO_KEY = re.compile(r"[^\x20-\x7e\xa0-\xff]")  # finds characters that a header must not have


class Api:
    """Calls one HTTP server of a deployment.

    Methods raise PdlaunchError if the server cannot be reached, sends nothing for ``timeout_s``, or
    answers in an unexpected form.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        *,
        socket_path: Path | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``socket_path``: the server's Unix socket, to be used instead of TCP."""
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._socket_path = socket_path
        self._headers = dict(headers or {})

    def engine(self, name: str) -> Api:
        """Return the API of one engine, through this router; needs the right to send commands."""
        url = f"{self.url}/pdlaunch/engines/{urllib.parse.quote(name, safe='')}"
        return Api(url, self._api_key, self._timeout_s, socket_path=self._socket_path)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text."""
        status, content = self._call(path)
        return status, content.decode(errors="replace")

    def get_object(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON object of the answer; error statuses do not raise."""
        return self._object(path, *self._call(path))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON object of the answer; error statuses do not raise."""
        return self._object(path, *self._call(path, json.dumps(body).encode()))

    def metrics(self) -> dict[str, float]:
        """Return the samples of ``/metrics``, summed over their labels."""
        # Import late: most commands read no metrics and need not wait for this import.
        from prometheus_client.parser import text_string_to_metric_families

        totals: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                totals[sample.name] += sample.value
        return totals

    def _object(self, path: str, status: int, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            answer = json.loads(content)
        except RecursionError:
            raise self._stranger(path, status, "its JSON is nested too deeply") from None
        except ValueError:
            raise self._stranger(path, status, "it is not JSON") from None
        if not isinstance(answer, dict):
            raise self._stranger(path, status, "it is not a JSON object")
        return status, answer

    def _stranger(self, path: str, status: int, problem: str) -> PdlaunchError:
        return PdlaunchError(
            f"{self._shown(path)} answers HTTP {status}, but not as a deployment of pdlaunch does: "
            f"{problem}"
        )

    def _call(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a request: POST with a ``body``, else GET. Return status and content."""
        # Use a new connection for each call: the router may have been replaced.
        headers = {"Connection": "close", **self._headers}
        if self._api_key:
            # Check before http.client, whose error would show the key.
            if _NO_KEY.search(self._api_key):
                raise PdlaunchError(
                    f"the key for {self.url} holds a character that no key may have, perhaps the "
                    "line end of the file that it was read from"
                )
            headers["Authorization"] = f"Bearer {self._api_key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        target = urllib.parse.urlsplit(self.url).path + path
        shown = self._shown(path)
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.request("GET" if body is None else "POST", target, body, headers)
                with connection.getresponse() as response:
                    # With a limit, because http.client allocates Content-Length bytes at once.
                    content = response.read(MAX_ANSWER_BYTES)
                    status, left_bytes = response.status, response.length
        # Python raises ValueError for invalid host names and chunk sizes.
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PdlaunchError(f"{shown} cannot be reached: {reason}") from error
        if len(content) == MAX_ANSWER_BYTES:
            raise PdlaunchError(f"{shown} answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
        if left_bytes:
            raise PdlaunchError(f"{shown} stopped in the middle of its answer")
        return status, content

    def _connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        # Always pass a port: otherwise http.client takes the end of an IPv6 address for the port.
        port = parts.port or kind.default_port
        connection = kind(parts.hostname or "", port, timeout=self._timeout_s)
        if self._socket_path is None:
            connection.connect()
            return connection
        until = time.monotonic() + ROUTER_RETURN_S
        while True:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(self._timeout_s)
            try:
                connection.sock.connect(str(self._socket_path))
                return connection
            except OSError as error:
                connection.sock.close()
                # Connections are refused while a dead router is being replaced.
                is_replaced = isinstance(error, ConnectionRefusedError)
                if not is_replaced or time.monotonic() >= until:
                    raise
            time.sleep(_POLL_S)

    def _shown(self, path: str) -> str:
        path = path.partition("?")[0]
        return f"{path} at {self._socket_path}" if self._socket_path else f"{self.url}{path}"


def check_url(url: str) -> None:
    """Raise PdlaunchError unless ``url`` is an HTTP(S) URL without a path: ``http://host:port``."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and parts.path in ("", "/")
        )
    except ValueError:
        is_usable = False
    if not is_usable:
        raise PdlaunchError(f"{url} is not the URL of a deployment; write http://host:port")
