"""Calls a router or an engine synchronously, for commands and tests.

The server need not be one of pdlaunch: each answer is bounded in bytes and, unlike a timeout of
``http.client``, which counts for each read alone, in time. Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdlaunch.errors import PdlaunchError

MAX_ANSWER_BYTES = 64 << 20
ROUTER_RETURN_S = 20.0
"""Time within which a launch starts a router again that has died, unless it dies again and again.
"""
_POLL_S = 0.05
_NO_KEY = re.compile(r"[^\x20-\x7e\xa0-\xff]")  # finds what cannot stand in a header


class Api:
    """Calls one HTTP server of a deployment.

    Methods raise PdlaunchError when the server cannot be reached, or its answer is not there,
    whole, ``timeout_s`` after the request was sent, or has another form than was asked for.
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
        """``socket_path``: the Unix socket of the server, in place of TCP."""
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._socket_path = socket_path
        self._headers = dict(headers or {})

    def engine(self, name: str) -> Api:
        """Return the API of one engine behind this router, for those who may command the launch."""
        url = f"{self.url}/pdlaunch/engines/{urllib.parse.quote(name, safe='')}"
        return Api(url, self._api_key, self._timeout_s, socket_path=self._socket_path)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text."""
        status, content = self._call(path)
        return status, self._text(path, status, content)

    def get_object(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON body, also of an error."""
        return self._object(path, *self._call(path))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON body, also of an error."""
        return self._object(path, *self._call(path, json.dumps(body).encode()))

    def post_text(self, path: str, body: dict[str, Any]) -> str:
        """Return a whole stream of events."""
        return self._text(path, *self._call(path, json.dumps(body).encode()))

    def metrics(self) -> dict[str, float]:
        """Return the samples of ``/metrics``, summed over their labels."""
        status, page = self.get("/metrics")
        totals: dict[str, float] = {}
        for line in page.splitlines():
            if line and not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                name = sample.split("{")[0]
                try:
                    totals[name] = totals.get(name, 0.0) + float(value)
                except ValueError:
                    raise self._stranger("/metrics", status, "a line is no sample") from None
        return totals

    def _text(self, path: str, status: int, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._stranger(path, status, "it is not in UTF-8") from None

    def _object(self, path: str, status: int, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            answer = json.loads(content)
        except RecursionError:
            raise self._stranger(path, status, "its JSON is nested too deeply") from None
        except ValueError:
            raise self._stranger(path, status, "it is no JSON") from None
        if not isinstance(answer, dict):
            raise self._stranger(path, status, "it is no JSON object")
        return status, answer

    def _stranger(self, path: str, status: int, problem: str) -> PdlaunchError:
        return PdlaunchError(
            f"{self._shown(path)} answers HTTP {status}, but not as a deployment of pdlaunch does: "
            f"{problem}"
        )

    def _call(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a request; POST with a ``body``. Redirects are answers: a key goes nowhere else."""
        # A connection for each call: the router may be another process the next time.
        headers = {"Connection": "close", **self._headers}
        if self._api_key:
            # http.client would show the value in its error.
            if _NO_KEY.search(self._api_key):
                raise PdlaunchError(
                    f"the key for {self.url} holds a character that no key may have: a line end, "
                    "perhaps, of the file that it was read from"
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
                    return response.status, _read(response)
        except _BadAnswerError as error:
            raise PdlaunchError(f"{shown} {error}") from error
        # Python raises ValueError for names that DNS cannot have.
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PdlaunchError(f"{shown} cannot be reached: {reason}") from error

    def _connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        # Without a port, the last part of an IPv6 address would be taken for one.
        port = parts.port or kind.default_port
        connection = kind(parts.hostname or "", port, timeout=self._timeout_s)
        connection.response_class = _Response
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
                # A router that has died is being replaced.
                is_replaced = isinstance(error, ConnectionRefusedError)
                if not is_replaced or time.monotonic() >= until:
                    raise
            time.sleep(_POLL_S)

    def _shown(self, path: str) -> str:
        path = path.partition("?")[0]
        return f"{path} at {self._socket_path}" if self._socket_path else f"{self.url}{path}"


class _BadAnswerError(http.client.HTTPException):
    """An answer cannot be read; the message goes on where the server's URL was named."""


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        # Below the buffer, everything counts: headers, sizes of chunks, trailers.
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock))


class _Reader(io.RawIOBase):
    """Reads from ``raw``, which reads from ``sock``, whose timeout is that of the whole answer."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout_s = sock.gettimeout() or 0.0
        self._deadline_at = time.monotonic() + self._timeout_s
        self._left_bytes = MAX_ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._deadline_at - time.monotonic()
        try:
            if left_s <= 0.0:
                raise TimeoutError
            self._sock.settimeout(left_s)
            num_bytes = self._raw.readinto(buffer) or 0
        except TimeoutError:
            raise _BadAnswerError(
                f"has not answered in full within {self._timeout_s:g} s"
            ) from None
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise _BadAnswerError(f"answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
        return num_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        # With a limit: what the headers promise is allocated at once.
        content = response.read(MAX_ANSWER_BYTES)
    except (http.client.IncompleteRead, ValueError):
        raise _BadAnswerError("stopped in the middle of its answer") from None
    if response.length:
        raise _BadAnswerError("stopped in the middle of its answer")
    return content


def check_url(url: str) -> None:
    """Raise PdlaunchError unless ``url`` is ``http://host:port`` or the like."""
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
        raise PdlaunchError(f"{url} is no URL of a deployment; write http://host:port")
