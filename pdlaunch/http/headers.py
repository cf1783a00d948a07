"""Reads the headers that follow a request from the client through the router to engines."""

from __future__ import annotations

import math
import re
import uuid

from pdlaunch.errors import RequestError
from pdlaunch.protocol.ids import NO_ORIGIN, HttpRequestId, PromptOrigin

REQUEST_ID_HEADER = "X-Request-Id"
TRACEPARENT_HEADER = "traceparent"
TRACESTATE_HEADER = "tracestate"
ORIGIN_HEADER = "X-Pdlaunch-Origin"
"""The router tells engines the PromptOrigin, and whether a rank may have died of the prompt."""
TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds in which a client wants the whole answer."""
SPANS_HEADER = "X-Pdlaunch-Spans"
"""A router that sends it gets a ``SpanReport`` with the answer, under the key ``pdlaunch``."""
MAX_REQUEST_ID_LENGTH = 200

_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID_LENGTH}}}")
_ORIGIN = re.compile(r"([1-9][0-9]{0,18})(;suspect)?")
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def read_request_id(header: str | None) -> HttpRequestId:
    """Return the client's request id, or a new one without the header.

    Raises RequestError when it is too long or not printable ASCII.
    """
    if not header:
        return HttpRequestId(uuid.uuid4().hex)
    if _REQUEST_ID.fullmatch(header) is None:
        raise RequestError(
            f"{REQUEST_ID_HEADER} must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII "
            "characters without spaces",
            param=REQUEST_ID_HEADER,
        )
    return HttpRequestId(header)


def read_timeout_s(header: str | None) -> float | None:
    """Return the seconds in which a client wants its answer; None: it does not say.

    Raises RequestError.
    """
    if header is None:
        return None
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < math.inf:
        raise RequestError(
            f"{TIMEOUT_HEADER} must be a positive number of seconds, such as 2.5",
            param=TIMEOUT_HEADER,
            code="invalid_value",
        )
    return timeout_s


def read_traceparent(header: str | None) -> str | None:
    """Return the ``traceparent`` as it came; None without one.

    A malformed one counts as none: the W3C standard says to ignore it.
    """
    if header is None or _TRACEPARENT.fullmatch(header) is None:
        return None
    return header


def format_origin(origin: PromptOrigin, *, is_suspect: bool = False) -> str:
    """Return the value of ``ORIGIN_HEADER`` for a number from 1 to 2^63 - 1."""
    return f"{origin};suspect" if is_suspect else str(origin)


def read_origin(header: str | None) -> tuple[PromptOrigin, bool]:
    """Return the number, and whether it is a suspect.

    ``NO_ORIGIN`` stands for a malformed header and for none: other routers do not send it.
    """
    match = _ORIGIN.fullmatch(header or "")
    if match is None or int(match[1]) >= 2**63:
        return NO_ORIGIN, False
    return PromptOrigin(int(match[1])), match[2] is not None
