"""Asks a deployment what became of its requests."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import quote

import msgspec

from pdlaunch.client.admin import admin_api
from pdlaunch.client.api import Api, check_url
from pdlaunch.errors import PdlaunchError
from pdlaunch.protocol.requests import RequestList, RequestTrace

READ_TIMEOUT_S = 30.0


def reading_api(url: str | None, api_key: str | None) -> Api:
    """Return the API of the launch of this user at ``url``, or of the only one; else of whoever
    answers at ``url``, with the clients' key.

    Raises PdlaunchError.
    """
    try:
        return admin_api(url)
    except PdlaunchError:
        if url is None:
            raise
    check_url(url)
    return Api(url, api_key, READ_TIMEOUT_S)


def read_trace(api: Api, request_id: str) -> RequestTrace:
    """Return all that is known of a request. Raises PdlaunchError."""
    path = f"/pdlaunch/requests/{quote(request_id, safe='')}"
    return msgspec.convert(_read(api, path), RequestTrace)


def find_ids(api: Api, choice: Literal["last", "slowest", "failed"], limit: int) -> list[str]:
    """Return the ids of requests, the one that fits best first. Raises PdlaunchError."""
    found = msgspec.convert(_read(api, f"/pdlaunch/requests?{choice}={limit}"), RequestList)
    return [summary.id for summary in found.requests]


def _read(api: Api, path: str) -> dict[str, Any]:
    status, answer = api.get_object(path)
    if status == 200:
        return answer
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    raise PdlaunchError(f"the router answers {status}: {message or 'it does not say why'}")
