"""Records what the router does for one request, and what engines tell of their parts of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.http.errors import CLIENT_CLOSED_REQUEST, RelayedError, error_status
from pdlaunch.observe.logs import escape_controls
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import (
    MAX_SPANS,
    PREFILL,
    PULL,
    QUEUE,
    SEATED,
    Attribute,
    Span,
    SpanLog,
    SpanReport,
)
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.openai.responses import Usage
from pdlaunch.protocol.status import RequestSummary, RequestTrace, SpanView
from pdlaunch.router.engine_client import EngineFailure
from pdlaunch.router.policy import Hop, Route
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)

ROUTER = "router"
MAX_MODEL_LENGTH = 200
CLIENT_LEFT = "the client went away"
MAX_ERROR_LENGTH = 300
MAX_CONTENT_LENGTH = 200
"""Characters of a prompt and of an output that are logged with ``log_content``."""
NO_ID = HttpRequestId("")  # stands for the id of a request whose record nobody keeps


MAX_HEARD_SPANS = 4 * MAX_SPANS
"""Spans that are kept of what one engine, with its ranks, tells of a call."""

AskSpans = Callable[[], Awaitable[SpanReport | None]]


class EngineCall:
    """Records one call of an engine, as a block; ``hear`` adds what the engine tells of it."""

    def __init__(
        self,
        log: SpanLog,
        hop: Hop,
        engine: str,
        attributes: dict[str, Attribute],
        content: dict[str, str] | None,
        ask: AskSpans | None,
    ) -> None:
        self.hop: Hop = hop
        self.engine = engine
        self.error: str | None = None
        self.spans: list[Span] = []
        """The engine's, on its own clock; ``placed`` returns them on the router's."""
        self.num_dropped = 0
        """Spans that the engine, or this process, has not kept."""
        self._first_at = 0.0
        self._log = log
        self._attributes = attributes
        self._content = content
        self._ask = ask
        self._span: Span | None = None
        self._sent_at = log.clock()
        self._ended = False

    def __enter__(self) -> EngineCall:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._content is not None and isinstance(error, EngineFailure):
            self._content["engine_text"] = cut_content(error.quote)
        described = None if error is None else describe_error(error)
        if described not in (None, CLIENT_LEFT):
            self._ask = None  # The engine has failed it.
        self.end(described)

    @property
    def is_cut(self) -> bool:
        """Return whether it ended before the engine told of it, which can be asked."""
        return self._ended and self._ask is not None and not self.spans

    async def ask(self) -> None:
        ask, self._ask = self._ask, None
        if ask is not None:
            self.hear(await ask())

    @property
    def span(self) -> Span | None:
        """Return its own span; None while it runs, or where there was no room for one."""
        return self._span

    @property
    def duration_s(self) -> float:
        return self._end_at - self._sent_at if self._ended else 0.0

    def hear(self, told: object) -> None:
        """Take the spans with which an engine has ended its answer, if any."""
        if told is None:
            return
        try:
            report = told if isinstance(told, SpanReport) else msgspec.convert(told, SpanReport)
        except msgspec.ValidationError as error:
            logger.debug("%s: its spans cannot be read: %s", self.engine, error)
            return
        error_s = report.clock_error_s(self._sent_at, self._log.clock())
        self.spans = report.spans[:MAX_HEARD_SPANS]
        self.num_dropped = report.num_dropped + len(report.spans) - len(self.spans)
        self._first_at = self._sent_at + error_s
        self._note("clock_error_ms", round(error_s * 1000, 3))

    def counts(self, usage: object) -> None:
        """Note by ``usage`` how much of the prompt was cached or pulled."""
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if isinstance(cached, int):
            self._note("cached_tokens", cached)

    def placed(self) -> list[Span]:
        return [span.moved(self._first_at, self.engine) for span in self.spans]

    def end(self, error: str | None = None) -> None:
        """End it, once."""
        if self._ended:
            return
        self._ended, self._end_at = True, self._log.clock()
        if error is not None:
            self.error = self._attributes["error"] = error
        self._log.add(
            f"{self.hop} at {self.engine}", self._sent_at, self._end_at, **self._attributes
        )
        # The last one, unless there was no room for it.
        if self._log.spans[-1].end_at == self._end_at:
            self._span = self._log.spans[-1]

    def _note(self, name: str, value: Attribute) -> None:
        """Add an attribute, also to a span that has ended."""
        self._attributes[name] = value
        if self._span is not None:
            self._span.attributes[name] = value

    def longest_s(self, name: str) -> float | None:
        return max([span.duration_s for span in self.spans if span.name == name], default=None)

    def total_s(self, name: str) -> float | None:
        """Return the sum of its spans of this name, of the first choice alone."""
        times = [
            span.end_at - span.start_at
            for span in self.spans
            if span.name == name and not span.attributes.get("choice")
        ]
        return sum(times) if times else None

    def covered_s(self, name: str) -> float | None:
        """Return the time from the first to the last of its spans of this name."""
        spans = [span for span in self.spans if span.name == name]
        if not spans:
            return None
        return max([span.end_at for span in spans]) - min([span.start_at for span in spans])

    def attributes(self, name: str) -> dict[str, Attribute]:
        """Return those of its first span of this name; empty without one."""
        for span in self.spans:
            if span.name == name:
                return span.attributes
        return {}


class RequestRecord:
    """Gathers what is known of one request, from the door to the end of its answer.

    ``clock`` counts seconds, ``wall`` is the time of day.
    """

    def __init__(
        self,
        request_id: HttpRequestId = NO_ID,
        path: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.id = request_id
        self.path = path
        self.received_at = wall()
        self.model: str | None = None
        self.kv_path: str | None = None
        self.retries = 0
        self.status: int | None = None
        self.error: str | None = None
        self.log = SpanLog(clock)
        self.trace_headers: dict[str, str] = {}
        """Headers by which the engines' own tracing knows its parent."""
        self.otel_span: Any = None
        self.content: dict[str, str] | None = None
        """Beginnings of prompt and output, for the log alone and only where the user wants them."""
        self._calls: list[EngineCall] = []
        self._explanation: str | None = None
        self.usage: Usage | None = None
        self.clock: RequestClock | None = None
        """Knows when tokens have left for the client."""
        self.transcripts: list[Transcript] = []
        """Of the prompts that run."""
        self._num_tokens = 0
        """Belongs to a request that has ended."""
        self.finish_reasons: dict[str, None] = {}
        self._end_at: float | None = None

    @property
    def is_done(self) -> bool:
        return self._end_at is not None

    @property
    def has_failed(self) -> bool:
        """Return whether the request was refused, dropped, or ended with an error."""
        return self.is_done and (self.error is not None or (self.status or 0) >= 400)

    @property
    def duration_s(self) -> float:
        end_at = self.log.clock() if self._end_at is None else self._end_at
        return end_at - self.log.start_at

    def understood(self, model: str | None, num_prompts: int) -> None:
        self.model = None if model is None else model[:MAX_MODEL_LENGTH]
        self.log.add("receive", self.log.start_at, prompts=num_prompts)

    def routed(self, hop: Hop, route: Route) -> None:
        logger.debug("route of %s: %s", hop, route)
        self._explanation = route.reason
        self.log.mark(
            "route",
            hop=hop,
            prefill=None if route.prefill is None else route.prefill.name,
            decode=None if route.decode is None else route.decode.name,
            explanation=route.reason,
        )

    def call(
        self, hop: Hop, engine: str, ask: AskSpans | None = None, **attributes: Attribute
    ) -> EngineCall:
        """Begin a call of an engine; ``ask`` has it tell of a call that was cut."""
        call = EngineCall(self.log, hop, engine, attributes, self.content, ask)
        self._calls.append(call)
        return call

    @property
    def cut_calls(self) -> list[EngineCall]:
        """Return the calls of a request without an answer, of which engines can still tell."""
        return [call for call in self._calls if call.is_cut] if self.has_failed else []

    def keep_content(self, prompt: bytes) -> None:
        """Keep how the prompt begins, as the client wrote it, and the output."""
        shown = prompt[: 4 * MAX_CONTENT_LENGTH].decode(errors="replace")
        self.content = {"prompt_text": cut_content(shown), "output_text": ""}

    def says(self, text: str) -> None:
        if self.content is not None and len(self.content["output_text"]) < MAX_CONTENT_LENGTH:
            self.content["output_text"] = cut_content(self.content["output_text"] + text)

    def fail(self, error: BaseException) -> None:
        """Note an error that the client is told of, the first one alone."""
        if self.error is None:
            self.status, self.error = error_status(error), describe_error(error)

    def end(self, status: int) -> None:
        """End the record, once. A ``status`` that an error has set before stays."""
        if self.is_done:
            return
        if self.status is None:
            self.status = status
        if status == CLIENT_CLOSED_REQUEST and self.error is None:
            self.status, self.error = status, CLIENT_LEFT
        for call in self._calls:
            call.end()
        self._num_tokens, self.transcripts = self._count_tokens(), []
        times, first_at = self.clock, self._first_token_at
        if times is not None and first_at is not None:
            self.log.add("first token", first_at, first_at)
            self.log.add("tokens", first_at, times.last_token_at, tokens=self._num_tokens)
        self._end_at = self.log.clock()
        self.log.add("end", self._end_at, self._end_at, status=self.status, error=self.error)

    def summary(self) -> RequestSummary:
        used = [call for call in self._calls if call.error is None]
        last = {call.hop: call for call in used}
        prefill, decode = last.get("prefill"), last.get("decode")
        computing = prefill or decode
        pull: dict[str, Attribute] = {} if decode is None else decode.attributes(PULL)
        at_first: dict[str, Attribute] = {} if computing is None else computing.attributes(SEATED)
        at_decode: dict[str, Attribute] = {} if decode is None else decode.attributes(SEATED)
        names = [call.engine for call in (prefill, decode) if call is not None]
        num_bytes, usage, first_at = _number(pull.get("bytes")), self.usage, self._first_token_at
        details = None if usage is None else usage.prompt_tokens_details
        return RequestSummary(
            id=self.id,
            received_at=self.received_at,
            status=self.status,
            state="done" if self.is_done else "running",
            path=self.path,
            model=self.model,
            prefill=None if prefill is None else prefill.engine,
            decode=None if decode is None else decode.engine,
            route="->".join(names) or None,
            explanation=self._explanation,
            kv_path=self.kv_path,
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            cached_tokens=None if details is None else details.cached_tokens,
            cached_device_tokens=_count(at_first.get("device_tokens")),
            cached_host_tokens=_count(at_first.get("host_tokens")),
            remote_tokens=_count(at_decode.get("remote_tokens")),
            queue_ms=_ms(_sum([call.total_s(QUEUE) for call in used])),
            prefill_ms=_ms(_prefill_s(prefill, decode)),
            pull_ms=None if decode is None else _ms(decode.longest_s(PULL)),
            pull_mb=None if num_bytes is None else round(num_bytes / 1e6, 3),
            pull_gb_s=_number(pull.get("gb_s")),
            verified=bool(pull["verified"]) if "verified" in pull else None,
            first_token_ms=None if first_at is None else _ms(first_at - self.log.start_at),
            output_tokens=self._num_output_tokens(),
            ms_per_token=self._ms_per_token(),
            total_ms=_ms(self.duration_s),
            retries=self.retries,
            finish_reason=",".join(self.finish_reasons) or None,
            error=self.error,
        )

    def trace(self) -> RequestTrace:
        """Return all that is known of the request, its spans in the order of their beginnings."""
        start_at = self.log.start_at
        whole = Span("request", start_at, start_at + self.duration_s, {"path": self.path})
        # Several calls may have gone to one engine: a prompt each, or the same one again.
        told: list[tuple[Span, Span | None]] = [(span, None) for span in self.log.spans]
        told += [(span, call.span) for call in self._calls for span in call.placed()]
        told.sort(key=lambda pair: pair[0].start_at)
        indices = {id(span): index for index, (span, _) in enumerate(told, 1)}
        spans = [
            SpanView(
                name=span.name,
                process=span.process or ROUTER,
                start_ms=round((span.start_at - start_at) * 1000, 3),
                end_ms=round((span.end_at - start_at) * 1000, 3),
                attributes=span.attributes,
                parent=indices.get(id(parent), 0),
            )
            for span, parent in [(whole, None), *told]
        ]
        return RequestTrace(
            **msgspec.structs.asdict(self.summary()),
            spans=spans,
            dropped_spans=self.log.num_dropped + sum(call.num_dropped for call in self._calls),
        )

    def _num_output_tokens(self) -> int | None:
        """Return the tokens so far; None for a request that no engine was asked for."""
        if self.usage is not None:
            return self.usage.completion_tokens
        return self._count_tokens() if self._calls else None

    @property
    def _first_token_at(self) -> float | None:
        return None if self.clock is None else self.clock.first_token_at

    def _count_tokens(self) -> int:
        """Return the tokens whose ids are known, so far."""
        return self._num_tokens + sum(transcript.num_tokens for transcript in self.transcripts)

    def _ms_per_token(self) -> float | None:
        """Return the mean time between two tokens of a choice."""
        times, first_at = self.clock, self._first_token_at
        if times is None or first_at is None:
            return None
        num_steps = self._count_tokens() - times.num_choices
        if num_steps <= 0 or times.last_token_at <= first_at:
            return None  # Answers of vLLM that are no streams come whole.
        return _ms((times.last_token_at - first_at) * times.num_choices / num_steps)


def _prefill_s(prefill: EngineCall | None, decode: EngineCall | None) -> float | None:
    """Return how long the prompt was computed, by spans, else by the whole prefill call."""
    if prefill is None:
        return None if decode is None else decode.covered_s(PREFILL)
    computed_s = prefill.covered_s(PREFILL)
    return prefill.duration_s if computed_s is None and not prefill.spans else computed_s


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _number(value: Attribute) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _count(value: Attribute) -> int | None:
    return value if isinstance(value, int) else None


def cut_content(text: str) -> str:
    """Return the beginning of a prompt or an output, as a log may show it."""
    return escape_controls(text)[:MAX_CONTENT_LENGTH]


def describe_error(error: BaseException) -> str:
    """Say what went wrong.

    An engine's refusal may quote the prompt: what it says beside its status is left out.
    """
    if isinstance(error, ConnectionError) or not isinstance(error, Exception):
        return CLIENT_LEFT
    if isinstance(error, RelayedError):
        return _relayed(error)
    if not isinstance(error, RequestError):
        return type(error).__name__
    text = f"{error.code}: {error}" if error.code else str(error)
    return text[:MAX_ERROR_LENGTH]


def _relayed(error: RelayedError) -> str:
    """Name what an engine's answer names: its code and the parameter, not its message."""
    try:
        body = msgspec.json.decode(error.body)["error"]
        named = [str(body[key]) for key in ("code", "param") if body.get(key)]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        named = []
    return ": ".join([str(error), *named])[:MAX_ERROR_LENGTH]
