"""Request ids and W3C trace context: read at the door, passed on through every hop."""

from __future__ import annotations

import re
import uuid

from pdlaunch.errors import RequestError

REQUEST_ID_HEADER = "X-Request-Id"
TRACEPARENT_HEADER = "traceparent"
ORIGIN_HEADER = "X-Pdlaunch-Origin"
"""From the router to engines: the number that it gave the prompt, and whether a rank may have died
of it.
"""
MAX_REQUEST_ID_LENGTH = 200

_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID_LENGTH}}}")
_ORIGIN = re.compile(r"([1-9][0-9]{0,18})(;suspect)?")
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def read_request_id(header: str | None) -> str:
    """The client's request id, or a new one; raises RequestError when it is too long or not
    printable ASCII.
    """
    if header is None or header == "":
        return uuid.uuid4().hex
    if _REQUEST_ID.fullmatch(header) is None:
        raise RequestError(
            (
                f"{REQUEST_ID_HEADER} must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII "
                "characters without spaces"
            ),
            param=REQUEST_ID_HEADER,
        )
    return header


def read_traceparent(header: str | None) -> str | None:
    """The ``traceparent`` as it came, or None where there is none or it is malformed (the standard
    says: ignore it).
    """
    if header is None or _TRACEPARENT.fullmatch(header) is None:
        return None
    return header


def format_origin(origin: int, *, is_suspect: bool = False) -> str:
    """``ORIGIN_HEADER`` for a number from 1 to 2^63 - 1."""
    return f"{origin};suspect" if is_suspect else str(origin)


def read_origin(header: str | None) -> tuple[int, bool]:
    """The number and whether it is a suspect; 0 without the header, which other routers do not
    send, or for a malformed one.
    """
    match = _ORIGIN.fullmatch(header or "")
    if match is None or int(match[1]) >= 2**63:
        return 0, False
    return int(match[1]), match[2] is not None
