"""Exceptions as OpenAI writes errors: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from pdlaunch.errors import KillsEngineError, OverloadedError, RequestError

RANK_LOST = "engine_restarting"
"""The code of an engine whose rank died while it computed the request."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_status(error: BaseException) -> int:
    """The HTTP status that answers ``error``: its own for a RequestError, else 500."""
    return error.status if isinstance(error, RequestError) else 500


def error_headers(error: BaseException) -> dict[str, str]:
    """``Retry-After`` where trying again helps; what keeps OpenAI's clients from it where it does
    harm.
    """
    if isinstance(error, KillsEngineError):
        return {"X-Should-Retry": "false"}
    return {"Retry-After": str(error.retry_after_s)} if isinstance(error, OverloadedError) else {}


def error_body(error: BaseException) -> dict[str, Any]:
    """The body that answers ``error``; of an unexpected exception nothing is shown, its place is
    the log.
    """
    status = error_status(error)
    request_error = (
        error
        if isinstance(error, RequestError)
        else RequestError("internal error, see the log", status=500)
    )
    return {
        "error": {
            "message": str(request_error),
            "type": _TYPES.get(
                status, "server_error" if status >= 500 else "invalid_request_error"
            ),
            "param": request_error.param,
            "code": request_error.code,
        }
    }


def model_not_found(given: str, served: str) -> RequestError:
    """The answer to a model name that nobody serves."""
    return RequestError(
        f"the model {given[:100]!r} does not exist; served here: {served!r}",
        param="model",
        status=404,
        code="model_not_found",
    )
