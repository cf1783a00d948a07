"""Puts the answers of several engines to a command together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import error_body
from pdlaunch.protocol.changes import RefusalCode

_STATUS: dict[RefusalCode, int] = {"engine_not_found": 404, "not_now": 409, "refused": 409}


class Outcome(NamedTuple):
    """Holds what became of a command at one engine."""

    engine: str
    status: int
    answer: dict[str, Any]


def refusal(message: str, code: RefusalCode) -> RequestError:
    """Return the error for a command that the supervisor refuses."""
    return RequestError(message, param="engine", status=_STATUS[code], code=code)


def engines_named(query: Sequence[str]) -> list[str]:
    """Return the engines that a query names, each once. Raises RequestError without any."""
    if not query:
        raise RequestError("name the engine: engine=NAME", param="engine", code="missing_engine")
    return list(dict.fromkeys(query))


def failed_outcome(engine: str, error: Exception) -> Outcome:
    """Return the outcome at an engine that did not answer."""
    failure = OverloadedError(str(error), status=503, code="engine_failed")
    return Outcome(engine, failure.status, error_body(failure))


def together(outcomes: Sequence[Outcome], **fields: Any) -> web.Response:
    """Return one answer of all engines, with the status and the error of the first that failed."""
    failed = next((outcome for outcome in outcomes if outcome.status != 200), None)
    body = fields | {
        "engines": [{"engine": outcome.engine, **outcome.answer} for outcome in outcomes]
    }
    if failed is not None:
        body["error"] = failed.answer.get("error")
    status = 200 if failed is None else failed.status
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
