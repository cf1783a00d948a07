"""Turns exceptions into answers: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.errors import KillsEngineError, OverloadedError, PdlaunchError, RequestError

RANK_LOST = "engine_restarting"  # error code: a rank of the engine died during the request
STARTING = "starting"  # error code: the launch does not serve yet
CLIENT_CLOSED_REQUEST = 499  # the client went away; only metrics show this status
RETRY_AFTER_S = 2  # Retry-After while an engine starts, restarts or wakes up
LEAVING_RETRY_AFTER_S = 5  # Retry-After while this process ends, until its successor serves

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
    """Holds an engine's answer with another status than 200; the client gets it unchanged."""

    def __init__(self, message: str, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status, self.body = status, body
        self.content_type = headers.get("content-type", "application/json").partition(";")[0]
        self.headers = {name: headers[name] for name in headers.keys() & {"retry-after"}}


def unavailable(message: str, code: str, retry_after_s: int = RETRY_AFTER_S) -> OverloadedError:
    """Return an error with status 503."""
    return OverloadedError(message, status=503, retry_after_s=retry_after_s, code=code)


def is_poll(error: BaseException | None) -> bool:
    """Return True if the error refuses a request because the launch is still starting."""
    return isinstance(error, RequestError) and error.code == STARTING


def error_response(error: BaseException) -> web.Response:
    """Return the answer to a request that failed before any of its answer was sent."""
    if isinstance(error, RelayedError):
        kind = error.content_type
        return web.Response(
            status=error.status, body=error.body, content_type=kind, headers=error.headers
        )
    explained = _explained(error)
    headers = {}
    if isinstance(explained, KillsEngineError):
        # Without this header, OpenAI's clients repeat a request after a 500.
        headers["X-Should-Retry"] = "false"
    if isinstance(explained, OverloadedError):
        headers["Retry-After"] = str(explained.retry_after_s)
    return json_response(error_body(explained), status=explained.status, headers=headers)


def error_status(error: BaseException) -> int:
    """Return the HTTP status for ``error``."""
    return error.status if isinstance(error, RequestError | RelayedError) else 500


def error_payload(error: BaseException) -> object:
    """Return the last event of a stream that failed after its headers were sent."""
    if isinstance(error, RelayedError):
        try:
            return msgspec.json.decode(error.body)
        except (ValueError, RecursionError):
            return error_body(RequestError(str(error), status=error.status))
    return error_body(_explained(error))


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the body of an error response, in OpenAI's form."""
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
    """Return a response with ``payload`` as JSON; msgspec must be able to encode it."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(payload),
        content_type="application/json",
        headers=headers,
    )


def model_not_found(given: str, served: str) -> RequestError:
    """Return the error for a model name that is not served."""
    message = f"the model {given[:100]!r} does not exist; served here: {served!r}"
    return RequestError(message, param="model", status=404, code="model_not_found")


def _explained(error: BaseException) -> RequestError:
    """Return the error that the client is sent. Unexpected exceptions are only logged."""
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
