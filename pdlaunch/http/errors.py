"""Turns exceptions into answers: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.errors import KillsEngineError, OverloadedError, PdlaunchError, RequestError

RANK_LOST = "engine_restarting"  # the code of an engine whose rank died of, or with, the request
STARTING = "starting"  # the code of requests before a launch serves
CLIENT_CLOSED_REQUEST = 499  # the status, in metrics alone, of a request whose client went away
RETRY_AFTER_S = 2  # seconds that a client should wait for an engine that starts or returns
LEAVING_RETRY_AFTER_S = 5  # and for the successor of a process that leaves

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

_logger = logging.getLogger(__name__)


class RelayedError(PdlaunchError):
    """Carries an engine's answer that is no 200; the client gets it as it is."""

    def __init__(
        self, message: str, *, status: int, body: bytes, content_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers


def is_poll(error: BaseException | None) -> bool:
    """Return whether a request polled a launch that is still starting."""
    return isinstance(error, RequestError) and error.code == STARTING


def error_response(error: BaseException) -> web.Response:
    """Return the answer to a request that failed before its answer began."""
    if isinstance(error, RelayedError):
        return web.Response(
            status=error.status,
            body=error.body,
            content_type=error.content_type,
            headers=error.headers,
        )
    explained = _explained(error)
    headers = {}
    if isinstance(explained, KillsEngineError):
        # OpenAI's clients repeat a 500 by themselves unless this tells them not to.
        headers["X-Should-Retry"] = "false"
    if isinstance(explained, OverloadedError):
        headers["Retry-After"] = str(explained.retry_after_s)
    return json_response(error_body(explained), status=explained.status, headers=headers)


def error_status(error: BaseException) -> int:
    """Return the HTTP status that tells of ``error``."""
    return error.status if isinstance(error, RequestError | RelayedError) else 500


def error_payload(error: BaseException) -> object:
    """Return the event that ends a stream whose headers were sent before ``error`` happened."""
    if isinstance(error, RelayedError):
        try:
            return msgspec.json.decode(error.body)
        except (ValueError, RecursionError):
            return error_body(RequestError(str(error), status=error.status))
    return error_body(_explained(error))


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the body that answers ``error``."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(error.status, default),
            "param": error.param,
            "code": error.code,
        }
    }


def json_response(
    payload: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return ``payload`` as JSON; msgspec must be able to encode it."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(payload),
        content_type="application/json",
        headers=headers,
    )


def model_not_found(given: str, served: str) -> RequestError:
    """Return the error for a model name that nobody serves."""
    return RequestError(
        f"the model {given[:100]!r} does not exist; served here: {served!r}",
        param="model",
        status=404,
        code="model_not_found",
    )


def _explained(error: BaseException) -> RequestError:
    """Return what the client is told. An unexpected exception is logged, and not shown."""
    match error:
        case RequestError():
            return error
        case web.RequestPayloadError():
            return RequestError(f"the body cannot be read: {error}", code="invalid_body")
        case web.HTTPRequestEntityTooLarge():
            return RequestError("the body is too large", status=413, code="body_too_large")
        case web.HTTPException():
            return RequestError(error.reason, status=error.status)
        case _:
            _logger.error("request failed", exc_info=error)
            return RequestError("internal error, see the log", status=500)
