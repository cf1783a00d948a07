"""Records one call of an engine, and what the engine tells of it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

import msgspec

from pdlaunch.observe.spans import MAX_SPANS, Attribute, Span, SpanLog, SpanReport
from pdlaunch.router.engine_errors import EngineFailure
from pdlaunch.router.policy import Hop
from pdlaunch.router.request_words import CLIENT_LEFT, cut_content, describe_error

logger = logging.getLogger(__name__)

MAX_HEARD_SPANS = 4 * MAX_SPANS
"""Spans that are kept of what one engine, with its ranks, tells of a call."""

AskSpans = Callable[[], Awaitable[SpanReport | None]]


class Leg:
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
        self.was_dropped = False
        """Its answer was not needed."""
        self.spans: list[Span] = []
        """Those that the engine has told, on a clock of its own; ``placed`` returns them on the
        router's.
        """
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

    def __enter__(self) -> Leg:
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
        """Tell whether it ended before the engine told of it, which can be asked."""
        return self._ended and self._ask is not None and not self.spans

    async def ask(self) -> None:
        """Have the engine tell of a call that was cut."""
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

    def sends(self) -> None:
        """Note that the engine is asked only now."""
        self._sent_at = self._log.clock()

    def hear(self, told: object) -> None:
        """Take the report with which an engine has ended its answer; None: it tells nothing."""
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
        """Note how much of the prompt the engine did not compute, by the ``usage`` of its answer:
        what it had cached, and what it has pulled.
        """
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if isinstance(cached, int):
            self._note("cached_tokens", cached)

    def placed(self) -> list[Span]:
        """Return the engine's spans on the router's clock."""
        return [span.moved(self._first_at, self.engine) for span in self.spans]

    def end(self, error: str | None = None) -> None:
        """End it, once."""
        if self._ended:
            return
        self._ended, self._end_at = True, self._log.clock()
        if error is not None:
            self.error = self._attributes["error"] = error
        if self.was_dropped:
            self._attributes["dropped"] = True
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
        """Return the longest of the engine's spans of this name; None: it has told none."""
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
