"""Calls a router or an engine synchronously, for commands and tests."""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdlaunch.config.http_names import is_loopback
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.answers import (
    AnyStatus,
    BadAnswerError,
    BoundedAnswers,
    StreamRequest,
    read_answer,
)

ROUTER_RETURN_S = 20.0
"""Time within which a launch starts a router again that has died, unless it dies again and again.
"""
_POLL_S = 0.05
_NO_KEY = re.compile(r"[^\x20-\x7e\xa0-\xff]")
"""Finds what cannot stand in a header."""


class Api:
    """Calls one HTTP server of a deployment.

    ``socket_path``: the Unix socket on which it listens, in place of TCP; ``url`` is then only what
    paths are added to. Methods raise PdlaunchError when it cannot be reached, or its answer is not
    there, whole, ``timeout_s`` after the request was sent, or is not of the form that is asked for.
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
        """``headers`` go with each request."""
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._socket_path = socket_path
        self._headers = dict(headers or {})
        host = urllib.parse.urlsplit(self.url).hostname or ""
        self._opener = _opener(socket_path, is_here=socket_path is not None or is_loopback(host))

    def engine(self, name: str) -> Api:
        """Return the API of one engine behind this router, which passes everything on to it.

        Only for those who may command the launch.
        """
        url = f"{self.url}/pdlaunch/engines/{urllib.parse.quote(name, safe='')}"
        return Api(url, self._api_key, self._timeout_s, socket_path=self._socket_path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON body, also of an error."""
        return self._read_object(path, *self._call(path, json.dumps(body).encode()))

    def post_text(self, path: str, body: dict[str, Any]) -> str:
        """Return the whole body as text, for streams of events, which may take longer."""
        status, content = self._call(path, json.dumps(body).encode(), StreamRequest)
        return self._read_text(path, status, content)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text."""
        status, content = self._call(path, None)
        return status, self._read_text(path, status, content)

    def get_object(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON body, also of an error."""
        return self._read_object(path, *self._call(path, None))

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

    def _read_text(self, path: str, status: int, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._stranger(path, status, "it is not in UTF-8") from None

    def _read_object(self, path: str, status: int, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            answer = json.loads(content)
        except RecursionError:
            raise self._stranger(path, status, "its JSON is nested too deeply") from None
        except ValueError:
            raise self._stranger(path, status, "it is no JSON") from None
        if not isinstance(answer, dict):
            raise self._stranger(path, status, "it is no JSON object")
        return status, answer

    def _stranger(self, path: str, status: int, what_is_wrong: str) -> PdlaunchError:
        return PdlaunchError(
            f"{self._shown(path)} answers HTTP {status}, but not as a deployment of pdlaunch does: "
            f"{what_is_wrong}"
        )

    def _call(
        self,
        path: str,
        body: bytes | None,
        kind: type[urllib.request.Request] = urllib.request.Request,
    ) -> tuple[int, bytes]:
        headers = dict(self._headers)
        if self._api_key:
            # Not in an error of http.client, which shows the value.
            if _NO_KEY.search(self._api_key):
                raise PdlaunchError(
                    f"the key for {self.url} holds a character that no key may have: a line end, "
                    "perhaps, of the file that it was read from"
                )
            headers["Authorization"] = f"Bearer {self._api_key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = kind(self.url + path, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return response.status, read_answer(response)
        except BadAnswerError as error:
            raise PdlaunchError(f"{self._shown(path)} {error}") from error
        # ValueError: Python's own word for names that DNS cannot have, and of bad proxies.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise PdlaunchError(
                f"{self._shown(path)} cannot be reached: {_reason(error)}"
            ) from error

    def _shown(self, path: str) -> str:
        shown = path.partition("?")[0]
        return (
            f"{self.url}{shown}" if self._socket_path is None else f"{shown} at {self._socket_path}"
        )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._path = path

    def connect(self) -> None:
        """Connect, or wait for the next router while one that has died is being replaced."""
        until = time.monotonic() + ROUTER_RETURN_S
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            try:
                self.sock.connect(str(self._path))
                return
            except ConnectionRefusedError:
                self.sock.close()
                if time.monotonic() >= until:
                    raise
                time.sleep(_POLL_S)


class _HttpHandler(BoundedAnswers, urllib.request.HTTPHandler):
    """Calls over TCP."""


class _HttpsHandler(BoundedAnswers, urllib.request.HTTPSHandler):
    """Calls over TLS."""


class _UnixHandler(BoundedAnswers, urllib.request.HTTPHandler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_UnixConnection, self._path), request)


@functools.cache
def _opener(socket_path: Path | None, *, is_here: bool) -> urllib.request.OpenerDirector:
    """Make an opener; what listens on this machine alone is reached through no proxy, whatever the
    environment says.
    """
    over_http = _HttpHandler() if socket_path is None else _UnixHandler(socket_path)
    handlers: list[urllib.request.BaseHandler] = [AnyStatus(), over_http, _HttpsHandler()]
    if is_here:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


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


def _reason(error: OSError | http.client.HTTPException | ValueError) -> str:
    """Return the cause in words, without the layers that it came through."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause)
