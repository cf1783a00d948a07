"""Defines and parses the headers between client, router and engines, in both directions."""

import re
import uuid
from collections.abc import Iterable, Mapping

from pdlaunch.errors import RequestError
from pdlaunch.protocol.ids import NO_ORIGIN, HttpRequestId, PromptOrigin

REQUEST_ID_HEADER = "X-Request-Id"
TRACEPARENT_HEADER = "traceparent"
TRACESTATE_HEADER = "tracestate"
DATA_PARALLEL_HEADER = "X-data-parallel-rank"  # the data parallel rank of vLLM that must answer
# Headers of the client that engines get, also an engine that continues a stream.
PASSED_HEADERS = (TRACEPARENT_HEADER, TRACESTATE_HEADER)
# From router to engines: the PromptOrigin, and whether the prompt may have killed a rank.
ORIGIN_HEADER = "X-Pdlaunch-Origin"
# In an answer: the engines that served the request. In a request: ``pair`` asks for a pair.
ROUTE_HEADER = "X-Pdlaunch-Route"
WANTS_PAIR = "pair"
SESSION_HEADER = "X-Session-Id"  # requests with the same value go to the same engines
# If a router sends it, the answer has a ``SpanReport`` under the key ``pdlaunch``.
SPANS_HEADER = "X-Pdlaunch-Spans"
IGNORED_FIELDS_HEADER = "X-Pdlaunch-Ignored-Fields"  # names, separated by commas
MAX_SENT_NAMES = 20
MAX_NAME_CHARS = 64
MAX_REQUEST_ID_LENGTH = 200

_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID_LENGTH}}}")
# Names of fields come from clients: only plain names may be put into a header.
_PLAIN_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARS}}}")
_ORIGIN = re.compile(r"([1-9][0-9]{0,18})(;suspect)?")


def read_request_id(header: str | None) -> HttpRequestId:
    """Return the request id from the header, or a new id without it. Raises RequestError."""
    if not header:
        return HttpRequestId(uuid.uuid4().hex)
    if _REQUEST_ID.fullmatch(header) is None:
        raise RequestError(
            f"{REQUEST_ID_HEADER} must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII "
            "characters without spaces",
            param=REQUEST_ID_HEADER,
        )
    return HttpRequestId(header)


def headers_to_pass(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the client's headers that engines get, without values that are not ASCII."""
    found = ((name, headers.get(name)) for name in PASSED_HEADERS)
    return {name: value for name, value in found if value is not None and value.isascii()}


def format_origin(origin: PromptOrigin, *, is_suspect: bool = False) -> str:
    """Return the value of ``ORIGIN_HEADER``."""
    return f"{origin};suspect" if is_suspect else str(origin)


def read_origin(header: str | None) -> tuple[PromptOrigin, bool]:
    """Return the origin and whether it is a suspect; ``NO_ORIGIN`` for an invalid header."""
    match = _ORIGIN.fullmatch(header or "")
    if match is None or int(match[1]) >= 2**63:
        return NO_ORIGIN, False
    return PromptOrigin(int(match[1])), match[2] is not None


def ignored_fields_header(names: Iterable[str]) -> dict[str, str]:
    """Return the header that lists the ignored fields with plain names; empty without any."""
    plain = list(dict.fromkeys(filter(_PLAIN_NAME.fullmatch, names)))[:MAX_SENT_NAMES]
    return {IGNORED_FIELDS_HEADER: ", ".join(plain)} if plain else {}
