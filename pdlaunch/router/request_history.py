"""Keeps the records of the requests that run, and of the last ones that have ended."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import AppRoute, End
from pdlaunch.http.errors import json_response
from pdlaunch.observe.logs import FIELDS, escape_controls
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.status import RequestList, RequestSummary
from pdlaunch.router.request_record import RequestRecord

logger = logging.getLogger(__name__)

DEFAULT_LISTED = 20
_CHOICES = ("last", "slowest", "failed")
_RECORD = web.RequestKey("record", RequestRecord)


def record_of(http: web.Request) -> RequestRecord:
    """Return the record that the door has begun."""
    return http[_RECORD]


class RequestHistory:
    """Holds every record, and logs each request that has ended; watches the door of the router.

    ``keep``: how many of those that have ended. ``show`` gets each line with the id, for a terminal
    that tells the time.
    """

    def __init__(self, keep: int, show: Callable[[str], None] | None) -> None:
        self._running: dict[int, RequestRecord] = {}
        self._done: deque[RequestRecord] = deque(maxlen=keep)
        self._show = show

    def begin(self, http: web.Request, request_id: HttpRequestId) -> End:
        """Begin the record of a client's request, as ``Watch``; return what ends it."""
        record = http[_RECORD] = RequestRecord(request_id, http.path[:200])
        self._running[id(record)] = record
        return partial(self._end, record)

    def _end(self, record: RequestRecord, status: int, error: BaseException | None) -> None:
        del self._running[id(record)]
        if error is not None:
            record.fail(error)
        record.end(status)
        self._done.append(record)
        try:
            log_request(record, self._show)
        except Exception:  # A record must never cost an answer.
            logger.exception("a request could not be logged")

    def routes(self) -> list[AppRoute]:
        return [
            AppRoute("GET", "/pdlaunch/requests", self._list),
            AppRoute("GET", "/pdlaunch/requests/{id:.+}", self._trace),
        ]

    def chosen(self, choice: str, limit: int) -> list[RequestRecord]:
        """Return at most ``limit`` records, the latest or the slowest first; running ones among the
        last and the slowest.
        """
        latest = self._latest()
        if choice == "slowest":
            latest.sort(key=lambda record: record.duration_s, reverse=True)
        elif choice == "failed":
            latest = [record for record in latest if record.has_failed]
        return latest[:limit]

    def _latest(self) -> list[RequestRecord]:
        return [*reversed(self._running.values()), *reversed(self._done)]

    async def _list(self, http: web.Request) -> web.Response:
        records = self.chosen(*_read_query(http.query))
        return json_response(RequestList(requests=[record.summary() for record in records]))

    async def _trace(self, http: web.Request) -> web.Response:
        for record in self._latest():
            if record.id == http.match_info["id"]:
                return json_response(record.trace())
        raise RequestError(
            f"no request of this id is remembered; the last {self._done.maxlen} are",
            param="id",
            status=404,
            code="request_not_found",
        )


def _read_query(query: Mapping[str, str]) -> tuple[str, int]:
    given = [choice for choice in _CHOICES if choice in query]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other", param=given[1])
    if not given:
        return "last", DEFAULT_LISTED
    text = query[given[0]]
    # Longer numbers than any that can be meant are refused before Python would refuse to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise RequestError(f"{given[0]} must be a whole number, 0 or more", param=given[0])
    return given[0], int(text)


def log_request(record: RequestRecord, show: Callable[[str], None] | None = None) -> None:
    """Write the line of a request that has ended."""
    if show is None and not logger.isEnabledFor(logging.INFO):
        return
    summary = record.summary()
    text = format_request(summary)
    fields = lambda: {"request": msgspec.to_builtins(summary)}  # noqa: E731
    logger.info("%s", text, extra={FIELDS: fields})
    if show is not None:
        show(escape_controls(f"[{summary.id}] {text}"))


def format_request(summary: RequestSummary) -> str:
    """Return what is known of a request in one line, without its id and time."""
    tiers = {
        "device": summary.cached_device_tokens,
        "host": summary.cached_host_tokens,
        "remote": summary.remote_tokens,
    }
    cached = " ".join(f"{tier} {number}" for tier, number in tiers.items() if number is not None)
    if not cached and summary.cached_tokens is not None:
        cached = str(summary.cached_tokens)
    words: list[tuple[object, str]] = [
        (summary.status, "{}"),
        (summary.path, "{}"),
        (summary.model, "model={}"),
        (summary.route and summary.route.replace("->", " -> "), "{}"),
        (summary.kv_path, "over {}"),
        (summary.prompt_tokens, "prompt={}"),
        (cached or None, "(cached {})"),
        (summary.queue_ms, "queue={:.1f}ms"),
        (summary.prefill_ms, "prefill={:.1f}ms"),
        (summary.pull_ms, "pull={:.1f}ms"),
        (summary.pull_mb, "{:.2f}MB"),
        (summary.pull_gb_s, "{:.2f}GB/s"),
        ({None: None, True: "verified", False: "unverified"}[summary.verified], "{}"),
        (summary.first_token_ms, "first={:.1f}ms"),
        (summary.output_tokens, "tokens={}"),
        (summary.ms_per_token, "{:.2f}ms/token"),
        (summary.total_ms, "total={:.1f}ms"),
        (summary.retries or None, "retries={}"),
        (summary.finish_reason, "finish={}"),
        (summary.explanation, "why: {}"),
        (summary.error, "error: {}"),
    ]
    known = (form.format(value) for value, form in words if value is not None)
    return escape_controls(" ".join(known))
