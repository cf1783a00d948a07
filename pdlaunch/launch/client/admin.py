"""Finds where a deployment is asked, or commanded: at the admin socket of a launch of this user, or
at a router by its URL and key; and reads its status and requests.

Commands a running deployment: sleep, wake, restart, drain, scale, roles.
"""

from __future__ import annotations

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

# Timeout of a command; longer than engines wait for what runs before they sleep
CALL_TIMEOUT_S = 900.0
READ_TIMEOUT_S = 30.0
Choice = Literal["last", "slowest", "failed"]
T = TypeVar("T")


def admin_api(
    url: str | None = None, admin_api_key: str | None = None, *, base: Path | None = None
) -> Api:
    """Return the API that commands the launch at ``url``, or the only one of this user.

    ``admin_api_key`` is only used where no launch of this user listens at ``url``. ``base``: the
    folder in which launches are looked for. Raises PdlaunchError when no launch, or more than one,
    fits.
    """
    if (own := _own_api(url, CALL_TIMEOUT_S, base)) is not None:
        return own
    if url is not None and admin_api_key is not None:
        return Api(url, admin_api_key, CALL_TIMEOUT_S)
    if url is not None:
        raise PdlaunchError(
            f"no launch of yours listens at {url}, and to command another's its --admin-api-key is "
            "needed"
        )
    raise PdlaunchError(
        "no launch of yours runs here; name another's router with --url and its key with "
        "--admin-api-key"
    )


def reading_api(url: str | None, api_key: str | None, timeout_s: float = READ_TIMEOUT_S) -> Api:
    """Return the API that reads the launch of this user at ``url``, or the only one; else of
    whoever answers at ``url``, with the clients' key.

    Raises PdlaunchError when no launch, or more than one, fits.
    """
    if (own := _own_api(url, timeout_s)) is not None:
        return own
    if url is None:
        raise PdlaunchError("no launch of yours runs here; name another's router with --url")
    return Api(url, api_key, timeout_s)


def _own_api(url: str | None, timeout_s: float, base: Path | None = None) -> Api | None:
    """Return the API of the one launch of this user that fits; None without any."""
    if url is not None:
        check_url(url)
    found = own_launches(url, base)
    if len(found) > 1:
        urls = ", ".join(sorted(launch.card.url for launch in found))
        raise PdlaunchError(f"several launches of yours run here; choose one with --url: {urls}")
    return launch_api(found[0], timeout_s) if found else None


def launch_api(launch: RunningLaunch, timeout_s: float) -> Api:
    """Return the API at the admin socket of a launch."""
    return Api("http://launch", timeout_s=timeout_s, socket_path=launch.admin_socket)


def own_launches(url: str | None, base: Path | None = None) -> list[RunningLaunch]:
    """Return the launches of this user that listen at ``url``; all of them without one."""
    launches = running_launches(base)
    return [each for each in launches if url is None or _address(each.card.url) == _address(url)]


def _address(url: str) -> tuple[str, int]:
    """Return host and port of a URL; all names of loopback are one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    return host, parts.port or (443 if parts.scheme == "https" else 80)


def read_status(api: Api) -> DeploymentStatus:
    """Return what the deployment does. Raises PdlaunchError."""
    return _read(api, "/pdlaunch/status", DeploymentStatus)


def read_trace(api: Api, request_id: HttpRequestId) -> RequestTrace:
    """Return all that is known of a request. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests/{quote(request_id, safe='')}", RequestTrace)


def read_requests(api: Api, choice: Choice, limit: int) -> list[RequestSummary]:
    """Return requests, the one that fits best first. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests?{choice}={limit}", RequestList).requests


def _read(api: Api, path: str, kind: type[T]) -> T:
    status, answer = api.get_object(path)
    if status == 200:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as misfit:
            raise PdlaunchError(
                f"the router answers as no pdlaunch of this version: {misfit}"
            ) from misfit
    fix = "; give the clients' key with --api-key" if status == 401 else ""
    message = error_message(answer) or "it does not say why"
    raise PdlaunchError(f"the router answers {status}: {message}{fix}")


def error_message(answer: dict[str, object]) -> str:
    """Return the message of an error in OpenAI's form; empty when there is none."""
    error = answer.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else ""


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a command at one engine."""

    engine: str
    error: str | None = None  # none: it is done
    is_sleeping: bool = False
    num_bytes: int = 0  # device memory that was given back or taken
    # After a drain: requests that still run, and prompts whose KV blocks are still to be read
    running: int = 0
    notes: Sequence[str] = ()


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a change."""

    change: PlannedChange | None = None  # None: it was refused before it was planned
    notes: Sequence[str] = ()
    error: str = ""  # empty: it is done, or could be


def command_engines(
    admin: Api, path: str, names: Sequence[str] = (), **query: object
) -> list[EngineOutcome]:
    """Command engines by name, or all: ``/sleep``, ``/wake_up``, ``/pdlaunch/drain``,
    ``/pdlaunch/undrain``, ``/pdlaunch/restart``. Returns when it is done.

    Raises PdlaunchError when the whole command is refused.
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
    """Send one of ``protocol.control.COMMANDS``. Returns when the launch has done it, such as
    when new engines serve. Raises PdlaunchError if the launch cannot be asked.
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
