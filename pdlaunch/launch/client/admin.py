"""Reads the status and requests of a running deployment, and sends it commands: sleep, wake,
restart, drain, scale, roles.

Uses the admin socket of a launch of this user, or a router's URL with a key.
"""

import contextlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api, check_url
from pdlaunch.protocol.control import PlannedChange
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.process.run_dirs import RunningLaunch, running_launches
from pdlaunch.protocol.status import DeploymentStatus, RequestList, RequestSummary, RequestTrace

# Timeout of a command; longer than engines wait for running requests before they sleep
CALL_TIMEOUT_S = 900.0
READ_TIMEOUT_S = 30.0
Choice = Literal["last", "slowest", "failed"]
T = TypeVar("T")


def admin_api(
    url: str | None = None, admin_api_key: str | None = None, *, base: Path | None = None
) -> Api:
    """Return the API for commands to the launch at ``url``, or to the only launch of this user.

    ``admin_api_key`` is only used if no launch of this user listens at ``url``. ``base``: the
    folder in which to look for launches. Raises PdlaunchError if no launch, or more than one,
    matches.
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
    """Return the API for reading the launch at ``url``, or the only launch of this user. If no
    launch of this user listens at ``url``, use ``api_key`` there.

    Raises PdlaunchError if no launch, or more than one, matches.
    """
    if (own := _own_api(url, timeout_s)) is not None:
        return own
    if url is None:
        raise PdlaunchError("no launch of yours runs here; name another router with --url")
    return Api(url, api_key, timeout_s)


def _own_api(url: str | None, timeout_s: float, base: Path | None = None) -> Api | None:
    """Return the API of the only matching launch of this user; None if there is none."""
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
    """Return the status of the deployment. Raises PdlaunchError."""
    return _read(api, "/pdlaunch/status", DeploymentStatus)


def read_trace(api: Api, request_id: HttpRequestId) -> RequestTrace:
    """Return the summary and spans of a request. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests/{quote(request_id, safe='')}", RequestTrace)


def read_requests(api: Api, choice: Choice, limit: int) -> list[RequestSummary]:
    """Return at most ``limit`` requests, the best match first. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests?{choice}={limit}", RequestList).requests


def _read(api: Api, path: str, kind: type[T]) -> T:
    status, answer = api.get_object(path)
    if status == 200:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as misfit:
            raise PdlaunchError(
                f"the router does not answer like this version of pdlaunch: {misfit}"
            ) from misfit
    fix = "; give the clients' key with --api-key" if status == 401 else ""
    message = error_message(answer) or "it does not say why"
    raise PdlaunchError(f"the router answers {status}: {message}{fix}")


def error_message(answer: dict[str, object]) -> str:
    """Return the message of an error in OpenAI's form; empty if there is none."""
    error = answer.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else ""


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the result of a command for one engine."""

    engine: str
    error: str | None = None  # None: success
    is_sleeping: bool = False
    num_bytes: int = 0  # device memory that was freed or allocated
    # After a drain: running requests, plus prompts whose KV blocks are not read yet
    running: int = 0
    notes: Sequence[str] = ()


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the result of a change of the launch."""

    change: PlannedChange | None = None  # None: the command was refused without a plan
    notes: Sequence[str] = ()
    error: str = ""  # empty: it succeeded, or would succeed (dry run)


def command_engines(
    admin: Api, path: str, names: Sequence[str] = (), **query: object
) -> list[EngineOutcome]:
    """Send a command to the named engines, or to all: ``/sleep``, ``/wake_up``,
    ``/pdlaunch/drain``, ``/pdlaunch/undrain``, ``/pdlaunch/restart``. Return when it is done.

    Raises PdlaunchError if the whole command is refused.
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
    """Send one of ``protocol.control.COMMANDS``. Return when the launch has finished it, such as
    when new engines serve. Raises PdlaunchError if the command is refused or cannot be sent.
    """
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
