"""Asks a deployment what it does, and what became of its requests."""

from __future__ import annotations

from typing import Literal, TypeVar
from urllib.parse import quote

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import own_launches
from pdlaunch.launch.client.api import Api, check_url
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.requests import RequestList, RequestSummary, RequestTrace
from pdlaunch.protocol.status import DeploymentStatus

READ_TIMEOUT_S = 30.0
Choice = Literal["last", "slowest", "failed"]
T = TypeVar("T")


def reading_api(url: str | None, api_key: str | None, timeout_s: float = READ_TIMEOUT_S) -> Api:
    """Return the API of the launch of this user at ``url``, or of the only one; else of whoever
    answers at ``url``, with the clients' key.

    Raises PdlaunchError when no launch, or more than one, fits.
    """
    if url is not None:
        check_url(url)
    found = own_launches(url)
    if len(found) == 1:
        return Api("http://launch", timeout_s=timeout_s, socket_path=found[0].admin_socket)
    if url is not None:
        return Api(url, api_key, timeout_s)
    if not found:
        raise PdlaunchError("no launch of yours runs here; name another's router by its URL")
    urls = ", ".join(sorted(launch.card.url for launch in found))
    raise PdlaunchError(f"several launches of yours run here; name one by its URL: {urls}")


def read_status(api: Api) -> DeploymentStatus:
    """Return what the deployment does. Raises PdlaunchError."""
    return _read(api, "/pdlaunch/status", DeploymentStatus)


def read_trace(api: Api, request_id: HttpRequestId) -> RequestTrace:
    """Return all that is known of a request. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests/{quote(request_id, safe='')}", RequestTrace)


def read_requests(api: Api, choice: Choice, limit: int) -> list[RequestSummary]:
    """Return requests, the one that fits best first. Raises PdlaunchError."""
    return _read(api, f"/pdlaunch/requests?{choice}={limit}", RequestList).requests


def find_ids(api: Api, choice: Choice, limit: int) -> list[HttpRequestId]:
    """Return the ids of requests, the one that fits best first. Raises PdlaunchError."""
    return [summary.id for summary in read_requests(api, choice, limit)]


def _read(api: Api, path: str, kind: type[T]) -> T:
    status, answer = api.get_object(path)
    if status == 200:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as misfit:
            raise PdlaunchError(
                f"the router answers as no pdlaunch of this version: {misfit}"
            ) from misfit
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    fix = "; give the clients' key with --api-key" if status == 401 else ""
    raise PdlaunchError(f"the router answers {status}: {message or 'it does not say why'}{fix}")
