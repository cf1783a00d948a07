"""Calls a router or an engine synchronously: reads the status and requests of a deployment, and
sends it commands.

Uses the admin socket of a launch of this user, or a router's URL with a key. The size of answers
is limited, because the server may be any program. Redirects are not followed, so no other server
gets the key, and proxy variables are ignored. ``http.client`` avoids the 0.15 s that importing
aiohttp adds to every command.
"""

import contextlib
import http.client
import ipaddress
import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.protocol.control import PlannedChange
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.process.run_dirs import RunningLaunch, running_launches
from pdlaunch.protocol.status import DeploymentStatus, RequestList, RequestSummary, RequestTrace

MAX_ANSWER_BYTES = 64 << 20
# Time in which a launch replaces a dead router, unless its routers die repeatedly
ROUTER_RETURN_S = 20.0
_POLL_S = 0.05
_NO_KEY = re.compile(r"[^\x20-\x7e\xa0-\xff]")  # finds characters that a header must not have


@dataclass(eq=False, repr=False)  # without the key in a representation
class Api:
    """Calls one HTTP server of a deployment. Raises PdlaunchError for all but usable answers."""

    url: str
    api_key: str | None = None
    timeout_s: float = 120.0
    socket_path: Path | None = None  # the server's Unix socket, to be used instead of TCP
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")

    def get(self, path: str) -> tuple[int, str]:
        status, content = self._call(path)
        return status, content.decode(errors="replace")

    def get_object(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON object of the answer; like ``post``, raise no error statuses."""
        return self._object(path, *self._call(path))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return self._object(path, *self._call(path, json.dumps(body).encode()))

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
        headers = {"Connection": "close", **self.headers}
        if self.api_key:
            # Check before http.client, whose error would show the key.
            if _NO_KEY.search(self.api_key):
                raise PdlaunchError(
                    f"the key for {self.url} holds a character that no key may have, perhaps the "
                    "line end of the file that it was read from"
                )
            headers["Authorization"] = f"Bearer {self.api_key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        target = urlsplit(self.url).path + path
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
        parts = urlsplit(self.url)
        is_tls = parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        # Always pass a port: otherwise http.client takes the end of an IPv6 address for the port.
        port = parts.port or kind.default_port
        connection = kind(parts.hostname or "", port, timeout=self.timeout_s)
        if self.socket_path is None:
            connection.connect()
            return connection
        until = time.monotonic() + ROUTER_RETURN_S
        while True:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(self.timeout_s)
            try:
                connection.sock.connect(str(self.socket_path))
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
        return f"{path} at {self.socket_path}" if self.socket_path else f"{self.url}{path}"


def check_url(url: str) -> None:
    """Raise PdlaunchError unless ``url`` is an HTTP(S) URL without a path: ``http://host:port``."""
    try:
        parts = urlsplit(url)
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


# Timeout of a command; longer than engines wait for running requests before they sleep
CALL_TIMEOUT_S = 900.0
READ_TIMEOUT_S = 30.0
Choice = Literal["last", "slowest", "failed"]
T = TypeVar("T")


def admin_api(
    url: str | None = None, admin_api_key: str | None = None, *, base: Path | None = None
) -> Api:
    """Return the API for commands to the launch at ``url``, or to the only one of this user. The
    key is only used if no launch of this user listens at ``url``. ``base``: where to look for them.
    Raises PdlaunchError if no launch, or more than one, matches.
    """
    if (own := _own_api(url, CALL_TIMEOUT_S, base)) is not None:
        return own
    if url is not None and admin_api_key is not None:
        return Api(url, admin_api_key, CALL_TIMEOUT_S)
    if url is not None:
        raise PdlaunchError(
            f"no launch of yours listens at {url}; to command another user's launch, give its "
            "--admin-api-key"
        )
    raise PdlaunchError(
        "no launch of yours runs here; name another launch's router with --url and its key with "
        "--admin-api-key"
    )


def reading_api(url: str | None, api_key: str | None, timeout_s: float = READ_TIMEOUT_S) -> Api:
    """Return the API for reading a launch, chosen as by ``admin_api``. Raises PdlaunchError."""
    if (own := _own_api(url, timeout_s)) is not None:
        return own
    if url is None:
        raise PdlaunchError("no launch of yours runs here; name another router with --url")
    return Api(url, api_key, timeout_s)


def _own_api(url: str | None, timeout_s: float, base: Path | None = None) -> Api | None:
    if url is not None:
        check_url(url)
    found = own_launches(url, base)
    if len(found) > 1:
        urls = ", ".join(sorted(launch.card.url for launch in found))
        raise PdlaunchError(f"several launches of yours run here; choose one with --url: {urls}")
    return launch_api(found[0], timeout_s) if found else None


def launch_api(launch: RunningLaunch, timeout_s: float) -> Api:
    """Return the API of a launch, through its admin socket."""
    return Api("http://launch", timeout_s=timeout_s, socket_path=launch.admin_socket)


def own_launches(url: str | None, base: Path | None = None) -> list[RunningLaunch]:
    """Return the launches of this user that listen at ``url``; all of them if it is None."""
    launches = running_launches(base)
    return [each for each in launches if url is None or _address(each.card.url) == _address(url)]


def _address(url: str) -> tuple[str, int]:
    """Return host and port of a URL; ``localhost`` for all loopback addresses."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    return host, parts.port or (443 if parts.scheme == "https" else 80)


def read_status(api: Api) -> DeploymentStatus:
    """Ask the router for the deployment's status. Raises PdlaunchError."""
    return _read(api, "/pdlaunch/status", DeploymentStatus)


def read_trace(api: Api, request_id: HttpRequestId) -> RequestTrace:
    """Return the summary and spans of a request. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests/{quote(request_id, safe='')}", RequestTrace)


def read_requests(api: Api, choice: Choice, limit: int) -> list[RequestSummary]:
    """Return at most ``limit`` requests, the best match first. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests?{choice}={limit}", RequestList).requests


def _read(api: Api, path: str, kind: type[T]) -> T:
    status, answer = api.get_object(path)
    if status != 200:
        fix = "; give the clients' key with --api-key" if status == 401 else ""
        message = error_message(answer) or "it does not say why"
        raise PdlaunchError(f"the router answers {status}: {message}{fix}")
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as misfit:
        message = "the router does not answer like this version of pdlaunch"
        raise PdlaunchError(f"{message}: {misfit}") from misfit


def error_message(answer: dict[str, object]) -> str:
    """Return the message of an error in OpenAI's form; empty if there is none."""
    error = answer.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else ""


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    error: str | None = None  # None: success
    is_sleeping: bool = False
    num_bytes: int = 0  # device memory that was freed or allocated
    # After a drain: running requests, plus prompts whose KV blocks are not read yet
    running: int = 0
    notes: Sequence[str] = ()


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    change: PlannedChange | None = None  # None: the command was refused without a plan
    notes: Sequence[str] = ()
    error: str = ""  # empty: it succeeded, or would succeed (dry run)


def command_engines(
    admin: Api, path: str, names: Sequence[str] = (), **query: object
) -> list[EngineOutcome]:
    """Send a command to engines, by default all; return once it is done. Raises PdlaunchError if
    the whole command is refused; an outcome has the error of its engine.
    """
    text = urlencode({**query, "engine": list(names)}, doseq=True)
    status, answer = admin.post(f"{path}?{text}" if text else path, {})
    if "engines" not in answer:
        raise _refused(path, status, answer)
    outcomes = []
    for each in answer["engines"]:
        error = (error_message(each) or "it does not say why") if "error" in each else None
        outcomes.append(msgspec.convert(each | {"error": error}, EngineOutcome))
    return outcomes


def command_launch(admin: Api, name: str, **fields: object) -> ChangeOutcome:
    """Send one of ``COMMANDS``; return once it is done. Raises PdlaunchError if it is refused."""
    status, answer = admin.post(f"/pdlaunch/{name}", fields)
    # An answer with notes describes a planned change, even if it failed.
    if status != 200 and "notes" not in answer:
        raise _refused(name, status, answer)
    error = "" if status == 200 else error_message(answer) or f"HTTP {status}"
    found = {"change": answer.get("change"), "notes": answer["notes"], "error": error}
    return msgspec.convert(found, ChangeOutcome)


def _refused(path: str, status: int, answer: dict[str, object]) -> PdlaunchError:
    command = path.rpartition("/")[2]
    return PdlaunchError(f"{command} was refused: {error_message(answer) or f'HTTP {status}'}")
