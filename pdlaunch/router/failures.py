"""What a client is told when a request fails: before its answer has begun a status, after that an
event.
"""

from __future__ import annotations

import logging

import msgspec
from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.protocol.openai.errors import error_body, error_headers, error_status
from pdlaunch.protocol.openai.sse import encode_error, encode_event
from pdlaunch.router.engine_client import EngineFailure, EngineRefusal
from pdlaunch.router.generation import RETRY_AFTER_S

logger = logging.getLogger(__name__)


def error_response(error: BaseException) -> web.Response:
    """The answer to a request that failed; an engine's refusal is passed on as it is."""
    if isinstance(error, EngineRefusal):
        headers = {} if error.retry_after is None else {"Retry-After": error.retry_after}
        return web.Response(
            status=error.status, body=error.body, content_type=error.content_type, headers=headers
        )
    error = _explained(error)
    return web.Response(
        status=error_status(error),
        body=msgspec.json.encode(error_body(error)),
        content_type="application/json",
        headers=error_headers(error),
    )


def error_event(error: BaseException) -> bytes:
    """The event that ends a stream whose headers were sent."""
    if isinstance(error, EngineRefusal):
        try:
            return encode_event(msgspec.json.decode(error.body))
        except msgspec.DecodeError:
            return encode_error(RequestError(str(error), status=error.status))
    return encode_error(_explained(error))


def _explained(error: BaseException) -> BaseException:
    """An error of the API where the failure has a name that a client can act on."""
    if isinstance(error, EngineFailure):
        if error.may_return:
            return OverloadedError(
                str(error), status=503, retry_after_s=RETRY_AFTER_S, code="engine_failed"
            )
        return RequestError(str(error), status=502, code="engine_failed")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return RequestError(
            f"the body is too large: {error.text}", status=413, code="body_too_large"
        )
    if isinstance(error, web.RequestPayloadError):
        return RequestError(f"the body cannot be read: {error}", code="invalid_body")
    if not isinstance(error, RequestError):
        logger.error("request failed", exc_info=error)
    return error
