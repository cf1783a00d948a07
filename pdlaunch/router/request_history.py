"""Records what the router and the engines do for each request.

Keeps the records of running requests and of the last ``MAX_KEPT`` ended ones.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial

import msgspec
from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import End
from pdlaunch.http.engine_calls import MALFORMED
from pdlaunch.http.errors import (
    CLIENT_CLOSED_REQUEST,
    RelayedError,
    error_status,
    is_poll,
    json_response,
)
from pdlaunch.observe import spans
from pdlaunch.observe.logs import FIELDS
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.openai.responses import Usage
from pdlaunch.protocol.status import RequestList, RequestSummary, RequestTrace, SpanView
from pdlaunch.router.continuation import Transcript
from pdlaunch.router.policy import Hop, Route

logger = logging.getLogger(__name__)

DEFAULT_LISTED = 20
MAX_KEPT = 500  # ended requests that are remembered: 6.5 MB
_CHOICES = ("last", "slowest", "failed")
ROUTER = "router"
CLIENT_LEFT = "the client went away"
MAX_MODEL_LENGTH = 200
MAX_ERROR_LENGTH = 300
MAX_ENGINE_SPANS = 4 * spans.MAX_SPANS  # for one call, from an engine and its ranks


class EngineCall(msgspec.Struct):
    hop: Hop
    engine: str
    span: spans.Span  # ends at 0 while the call runs
    error: str | None = None
    engine_spans: list[spans.Span] = []  # the engine's spans, on the router's clock
    num_dropped: int = 0  # spans that the engine or the router has dropped

    @property
    def is_over(self) -> bool:
        return self.span.end_at > 0

    def add_report(self, told: object, now_at: float) -> None:
        if told is None:
            return
        try:
            report = msgspec.convert(told, spans.SpanReport)
        except (ValueError, RecursionError) as error:
            logger.debug("%s: its spans cannot be read: %s", self.engine, error)
            return
        sent_at = self.span.start_at
        self.engine_spans = report.placed(sent_at, now_at, self.engine)[:MAX_ENGINE_SPANS]
        self.num_dropped = report.num_dropped + len(report.spans) - len(self.engine_spans)
        error_s = report.clock_error_s(sent_at, now_at)
        self.span.attributes["clock_error_ms"] = round(error_s * 1000, 3)

    def counts(self, usage: object) -> None:
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if isinstance(cached, int):
            self.span.attributes["cached_tokens"] = cached

    def named(self, name: str) -> list[spans.Span]:
        return [span for span in self.engine_spans if span.name == name]

    def attributes(self, name: str) -> dict[str, spans.Attribute]:
        return next((span.attributes for span in self.named(name)), {})


class RequestRecord:
    def __init__(self, request_id: HttpRequestId, path: str) -> None:
        # What is known so far; ``summary`` adds what the calls tell.
        self.known = RequestSummary(id=request_id, received_at=time.time(), path=path)
        self.log = spans.SpanLog()
        self.usage: Usage | None = None
        self.clock: RequestClock | None = None  # knows when tokens were sent to the client
        self.transcripts: list[Transcript] = []  # of the running prompts
        self.finish_reasons: dict[str, None] = {}
        self._calls: list[EngineCall] = []
        self._num_tokens = 0  # of a request that has ended
        self._end_at: float | None = None

    @property
    def is_done(self) -> bool:
        return self._end_at is not None

    @property
    def has_failed(self) -> bool:
        return self.is_done and (self.known.error is not None or (self.known.status or 0) >= 400)

    @property
    def duration_s(self) -> float:
        end_at = self.log.clock() if self._end_at is None else self._end_at
        return end_at - self.log.start_at

    @property
    def num_tokens(self) -> int:
        return self._num_tokens + sum(transcript.num_tokens for transcript in self.transcripts)

    def used_tokens(self, num_prompt_tokens: int) -> tuple[int, int]:
        """Return the prompt and output tokens. ``num_prompt_tokens``: estimate for errors."""
        if self.usage is not None:
            return self.usage.prompt_tokens, self.usage.completion_tokens
        return (num_prompt_tokens if self.num_tokens else 0), self.num_tokens

    def understood(self, model: str | None, num_prompts: int) -> None:
        self.known.model = None if model is None else model[:MAX_MODEL_LENGTH]
        self.log.add("receive", self.log.start_at, prompts=num_prompts)

    def routed(self, hop: Hop, route: Route) -> None:
        logger.debug("route of %s: %s: %s", hop, route.name or "no engine", route.reason)
        self.known.explanation = route.reason
        prefill, decode = (e.name if e else None for e in (route.prefill, route.decode))
        self.log.mark("route", hop=hop, prefill=prefill, decode=decode, explanation=route.reason)

    @contextlib.contextmanager
    def call(self, hop: Hop, engine: str) -> Iterator[EngineCall]:
        call = EngineCall(hop, engine, spans.Span(f"{hop} at {engine}", self.log.clock(), 0.0))
        self._calls.append(call)
        try:
            yield call
        except BaseException as error:
            call.error = call.span.attributes["error"] = describe_error(error)
            raise
        finally:
            call.span.end_at = self.log.clock()

    def fail(self, error: BaseException) -> None:
        if self.known.error is None:
            self.known.status, self.known.error = error_status(error), describe_error(error)

    def end(self, status: int) -> None:
        known = self.known
        if status == CLIENT_CLOSED_REQUEST and known.error is None:
            known.status, known.error = status, CLIENT_LEFT
        known.status = known.status or status  # that of an error which was recorded earlier stays
        # Drop the transcripts, which hold every token.
        self._num_tokens, self.transcripts = self.num_tokens, []
        if self.clock is not None and (first_at := self.clock.first_token_at) is not None:
            self.log.add("first token", first_at, first_at)
            self.log.add("tokens", first_at, self.clock.last_token_at, tokens=self._num_tokens)
        self._end_at = self.log.clock()
        self.log.add("end", self._end_at, self._end_at, status=known.status, error=known.error)

    def summary(self) -> RequestSummary:
        used = [call for call in self._calls if call.error is None]
        last = {call.hop: call for call in used}
        prefill, decode = last.get("prefill"), last.get("decode")
        told = msgspec.structs.replace(
            self.known,
            state="done" if self.is_done else "running",
            route="->".join(call.engine for call in (prefill, decode) if call) or None,
            output_tokens=self.num_tokens if self._calls else None,
            total_ms=_ms(self.duration_s),
            finish_reason=",".join(self.finish_reasons) or None,
        )
        if (computing := prefill or decode) is not None:
            seated = computing.attributes(spans.SEATED)
            told.cached_device_tokens = _count(seated.get("device_tokens"))
            told.cached_host_tokens = _count(seated.get("host_tokens"))
            told.prefill_ms = _ms(_prefill_s(computing))
        if prefill is not None:
            told.prefill = prefill.engine
        if decode is not None:
            told.decode = decode.engine
            told.remote_tokens = _count(decode.attributes(spans.SEATED).get("remote_tokens"))
            if pulls := decode.named(spans.PULL):
                pull = pulls[0].attributes
                told.pull_ms = _ms(max(span.duration_s for span in pulls))
                told.pull_gb_s = _number(pull.get("gb_s"))
                if (num_bytes := _number(pull.get("bytes"))) is not None:
                    told.pull_mb = round(num_bytes / 1e6, 3)
                if "verified" in pull:
                    told.verified = bool(pull["verified"])
        # The choices of a prompt wait at the same time.
        queued = [span for call in used for span in call.named(spans.QUEUE)]
        if waits_s := [span.duration_s for span in queued if not span.attributes.get("choice")]:
            told.queue_ms = _ms(sum(waits_s))
        if (usage := self.usage) is not None:
            told.prompt_tokens, told.output_tokens = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                told.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if self.clock is not None and (first_at := self.clock.first_token_at) is not None:
            told.first_token_ms = _ms(first_at - self.log.start_at)
            num_choices, took_s = self.clock.num_choices, self.clock.last_token_at - first_at
            num_steps = self.num_tokens - num_choices
            # Whole answers of vLLM arrive at once, so they have no time per token.
            if num_steps > 0 and took_s > 0:
                told.ms_per_token = _ms(took_s * num_choices / num_steps)
        return told

    def trace(self) -> RequestTrace:
        start_at, ended = self.log.start_at, [call for call in self._calls if call.is_over]
        whole = spans.Span(
            "request", start_at, start_at + self.duration_s, {"path": self.known.path}
        )
        # Each span with its parent. Several calls may go to the same engine.
        told = [(span, whole) for span in (*self.log.spans, *(call.span for call in ended))]
        told += [(span, call.span) for call in ended for span in call.engine_spans]
        told.sort(key=lambda pair: pair[0].start_at)
        places = {id(span): place for place, (span, _) in enumerate(told, 1)}
        views = [
            SpanView(
                name=span.name,
                process=span.process or ROUTER,
                start_ms=round((span.start_at - start_at) * 1000, 3),
                end_ms=round((span.end_at - start_at) * 1000, 3),
                attributes=span.attributes,
                parent=places.get(id(parent), 0),
            )
            for span, parent in [(whole, whole), *told]
        ]
        dropped_spans = self.log.num_dropped + sum(call.num_dropped for call in self._calls)
        summary = msgspec.structs.asdict(self.summary())
        return RequestTrace(**summary, spans=views, dropped_spans=dropped_spans)


def _prefill_s(call: EngineCall) -> float | None:
    if steps := call.named(spans.PREFILL):
        return max(span.end_at for span in steps) - min(span.start_at for span in steps)
    is_unreported = call.hop == "prefill" and call.is_over and not call.engine_spans
    return call.span.duration_s if is_unreported else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _number(value: spans.Attribute) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _count(value: spans.Attribute) -> int | None:
    return value if isinstance(value, int) else None


def describe_error(error: BaseException) -> str:
    """Return a text of at most ``MAX_ERROR_LENGTH`` characters that describes an error."""
    if isinstance(error, ConnectionError) or not isinstance(error, Exception):
        return CLIENT_LEFT
    if isinstance(error, RelayedError):
        # An engine's refusal may quote the prompt, so only its ``code`` and ``param`` are shown.
        named: list[str] = []
        with contextlib.suppress(*MALFORMED):
            body = msgspec.json.decode(error.body)["error"]
            named = [str(body[key]) for key in ("code", "param") if body.get(key)]
        text = ": ".join([str(error), *named])
    elif isinstance(error, RequestError):
        text = f"{error.code}: {error}" if error.code else str(error)
    else:
        text = type(error).__name__
    return text[:MAX_ERROR_LENGTH]


_RECORD = web.RequestKey("record", RequestRecord)


def record_of(http: web.Request) -> RequestRecord:
    """Return the record of a request, which ``RequestHistory.begin`` has made."""
    return http[_RECORD]


class RequestHistory:
    def __init__(self) -> None:
        self._running: dict[int, RequestRecord] = {}
        self._done: deque[RequestRecord] = deque(maxlen=MAX_KEPT)

    def begin(self, http: web.Request, request_id: HttpRequestId) -> End:
        record = http[_RECORD] = RequestRecord(request_id, http.path[:200])
        self._running[id(record)] = record
        return partial(self._end, record)

    def _end(self, record: RequestRecord, status: int, error: BaseException | None) -> None:
        del self._running[id(record)]
        if error is not None:
            record.fail(error)
        record.end(status)
        if not is_poll(error):
            self._done.append(record)
        if not logger.isEnabledFor(logging.INFO):
            return
        try:
            summary = record.summary()
            fields = {FIELDS: lambda: {"request": msgspec.to_builtins(summary)}}
            logger.info("%s", summary.line, extra=fields)
        except Exception:  # A fault in the log must not lose the answer.
            logger.exception("a request could not be logged")

    def chosen(self, choice: str, limit: int) -> list[RequestRecord]:
        latest = self._latest()
        if choice == "slowest":
            latest.sort(key=lambda record: record.duration_s, reverse=True)
        elif choice == "failed":
            latest = [record for record in latest if record.has_failed]
        return latest[:limit]

    def _latest(self) -> list[RequestRecord]:
        return [*reversed(self._running.values()), *reversed(self._done)]

    async def list_some(self, http: web.Request) -> web.Response:
        records = self.chosen(*_read_query(http.query))
        return json_response(RequestList(requests=[record.summary() for record in records]))

    async def trace(self, http: web.Request) -> web.Response:
        for record in self._latest():
            if record.known.id == http.match_info["id"]:
                return json_response(record.trace())
        message = f"the router has no request with this id; it keeps the last {MAX_KEPT}"
        raise RequestError(message, param="id", status=404, code="request_not_found")


def _read_query(query: Mapping[str, str]) -> tuple[str, int]:
    given = [choice for choice in _CHOICES if choice in query]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other", param=given[1])
    if not given:
        return "last", DEFAULT_LISTED
    text = query[given[0]]
    # Python raises ValueError for numbers with thousands of digits, so refuse long numbers first.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise RequestError(f"{given[0]} must be a whole number, 0 or more", param=given[0])
    return given[0], int(text)
