"""Keeps the records of the requests that run, and of the last ones that have ended."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import AppRoute, End
from pdlaunch.http.errors import json_response
from pdlaunch.observe.logs import FIELDS, escape_controls
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.status import RequestList, RequestSummary
from pdlaunch.router.otlp import OtlpExporter
from pdlaunch.router.request_record import EngineCall, RequestRecord

logger = logging.getLogger(__name__)

DEFAULT_LISTED = 20
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
Choice = Literal["last", "slowest", "failed"]
_CHOICES: tuple[Choice, ...] = ("last", "slowest", "failed")
_RECORD = web.RequestKey("record", RequestRecord)


def record_of(http: web.Request) -> RequestRecord:
    """Return the record of a request; one that nobody keeps where the door has made none."""
    return http.get(_RECORD) or RequestRecord()


class RequestHistory:
    """Holds every record, and logs each request that has ended; watches the door of the router.

    ``keep``: how many of those that have ended. ``show`` gets each line with the id, for a terminal
    that tells the time. ``exporter`` sends records away. ``spawn`` runs what outlives a request,
    while engines can be asked.
    """

    def __init__(
        self,
        keep: int,
        show: Callable[[str], None] | None = None,
        exporter: OtlpExporter | None = None,
        spawn: Spawn = asyncio.ensure_future,
    ) -> None:
        self._exporter = exporter
        self._running: dict[int, RequestRecord] = {}
        self._done: deque[RequestRecord] = deque(maxlen=keep)
        self._show = show
        self._spawn = spawn
        self._late: set[asyncio.Task[None]] = set()

    def begin(self, http: web.Request, request_id: HttpRequestId) -> End:
        """Begin the record of a client's request, as ``Watch``; return what ends it."""
        record = http[_RECORD] = RequestRecord(request_id, http.path[:200])
        self._running[id(record)] = record
        if self._exporter is not None:
            self._exporter.begin(record, http.headers)
        return partial(self._end, record)

    def _end(self, record: RequestRecord, status: int, error: BaseException | None) -> None:
        del self._running[id(record)]
        if error is not None:
            record.fail(error)
        record.end(status)
        self._done.append(record)
        try:
            log_request(record, self._show)
            if calls := record.cut_calls:
                task = self._spawn(self._hear_late(record, calls))
                self._late.add(task)
                task.add_done_callback(self._late.discard)
            elif self._exporter is not None:
                self._exporter.end(record)
        except Exception:  # A record must never cost an answer.
            logger.exception("a request could not be logged")

    async def _hear_late(self, record: RequestRecord, calls: Sequence[EngineCall]) -> None:
        """Ask engines for their parts of a request whose client went away."""
        await asyncio.gather(*(call.ask() for call in calls))
        if self._exporter is not None:
            self._exporter.end(record)

    async def close(self) -> None:
        """Send what has not been sent, without holding up the event loop."""
        if self._late:
            await asyncio.wait(self._late)
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            await asyncio.to_thread(exporter.close)

    def chosen(self, choice: Choice, limit: int) -> list[RequestRecord]:
        """Return at most ``limit`` records, the latest or the slowest first; running ones among the
        last and the slowest.
        """
        latest = [*reversed(self._running.values()), *reversed(self._done)]
        if choice == "slowest":
            latest.sort(key=lambda record: record.duration_s, reverse=True)
        elif choice == "failed":
            latest = [record for record in latest if record.has_failed]
        return latest[:limit]

    def routes(self) -> list[AppRoute]:
        """Return the routes that tell of requests."""
        return [
            AppRoute("GET", "/pdlaunch/requests", self._list),
            AppRoute("GET", "/pdlaunch/requests/{id:.+}", self._trace),
        ]

    async def _list(self, http: web.Request) -> web.Response:
        choice, limit = _read_query(http.query)
        records = self.chosen(choice, limit)
        return json_response(RequestList(requests=[record.summary() for record in records]))

    async def _trace(self, http: web.Request) -> web.Response:
        name, all_ = http.match_info["id"], len(self._running) + len(self._done)
        found = (each for each in self.chosen("last", all_) if each.id == name)
        if (record := next(found, None)) is None:
            raise RequestError(
                f"no request of this id is remembered; the last {self._done.maxlen} are",
                param="id",
                status=404,
                code="request_not_found",
            )
        return json_response(record.trace())


def _read_query(query: Mapping[str, str]) -> tuple[Choice, int]:
    """Return what a list is to hold. Raises RequestError."""
    given = [choice for choice in _CHOICES if choice in query]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other", param=given[1])
    if not given:
        return "last", DEFAULT_LISTED
    (choice,) = given
    text = query[choice]
    # Longer numbers than any that can be meant are refused before Python would refuse to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise RequestError(f"{choice} must be a whole number, 0 or more", param=choice)
    return choice, int(text)


def log_request(record: RequestRecord, show: Callable[[str], None] | None = None) -> None:
    """Write the line of a request that has ended."""
    if show is None and not logger.isEnabledFor(logging.INFO):
        return
    summary = record.summary()
    text, content = format_request(summary), record.content or {}
    text += "".join(f' {name}="{value}"' for name, value in content.items())
    fields = lambda: {"request": msgspec.to_builtins(summary) | content}  # noqa: E731
    logger.info("%s", text, extra={FIELDS: fields})
    if show is not None:
        show(escape_controls(f"[{summary.id}] {text}"))


def format_request(summary: RequestSummary) -> str:
    """Return what is known of a request in one line, without its id and time."""
    words = [
        f"{summary.status} {summary.path}",
        *_known(summary.model, "model={}"),
        *_known(summary.route and summary.route.replace("->", " -> "), "{}"),
        *_known(summary.kv_path, "over {}"),
        *_known(summary.prompt_tokens, "prompt={}"),
        *_cached(summary),
        *_known(summary.queue_ms, "queue={:.1f}ms"),
        *_known(summary.prefill_ms, "prefill={:.1f}ms"),
        *_pull(summary),
        *_known(summary.first_token_ms, "first={:.1f}ms"),
        *_known(summary.output_tokens, "tokens={}"),
        *_known(summary.ms_per_token, "{:.2f}ms/token"),
        *_known(summary.total_ms, "total={:.1f}ms"),
        *([f"retries={summary.retries}"] if summary.retries else []),
        *_known(summary.finish_reason, "finish={}"),
        *_known(summary.explanation, "why: {}"),
        *_known(summary.error, "error: {}"),
    ]
    return escape_controls(" ".join(words))


def _known(value: object, form: str) -> list[str]:
    return [] if value is None else [form.format(value)]


def _cached(summary: RequestSummary) -> list[str]:
    counts = {
        "device": summary.cached_device_tokens,
        "host": summary.cached_host_tokens,
        "remote": summary.remote_tokens,
    }
    known = " ".join(f"{name} {count}" for name, count in counts.items() if count is not None)
    known = known or " ".join(_known(summary.cached_tokens, "{}"))
    return [f"(cached {known})"] if known else []


def _pull(summary: RequestSummary) -> list[str]:
    if summary.pull_ms is None:
        return []
    parts = [
        f"pull={summary.pull_ms:.1f}ms",
        *_known(summary.pull_mb, "{:.2f}MB"),
        *_known(summary.pull_gb_s, "{:.2f}GB/s"),
    ]
    if summary.verified is not None:
        parts.append("verified" if summary.verified else "unverified")
    return parts
