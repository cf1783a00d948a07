"""Records what processes do for one request, as spans on one clock.

Each process has its own ``SpanLog`` for a request. It sends a ``SpanReport`` with its answer. The
process that called it places the spans of the report on its own clock::

    caller    sent ├──────────────────────────────────────────┤ received
    process          received ├─ its spans, seconds from here ─┤ reported
                   └ half of the remaining time on each side ─┘

So no two clocks are compared. The error is at most half of the time spent in transit.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

Attribute = str | int | float | bool | None

MAX_SPANS = 128  # spans that one process records for one request; further ones are only counted

# Names of spans
QUEUE = "queue"  # the wait for a place in the batch
PREFILL = "prefill"  # the part of a prompt that one step computes: ``tokens``
PULL = "pull"  # a pull, from the time its lease was known: ``bytes``, ``gb_s``, ``verified``
# The time at which a request enters the batch. ``device_tokens``, ``host_tokens``,
# ``remote_tokens``: prompt tokens that are not computed here, by where their KV blocks come from.
SEATED = "seated"


class Span(msgspec.Struct):
    """Describes what a process did between two instants; they are equal for a single event."""

    name: str
    start_at: float  # seconds on the clock of the process that holds the span
    end_at: float
    attributes: dict[str, Attribute] = {}
    # Name of the process that recorded the span, as its caller names it; empty for own spans. If
    # spans pass through several callers, names are joined: decode-0/rank-0.
    process: str = ""

    @property
    def duration_s(self) -> float:
        return self.end_at - self.start_at

    def moved(self, by_s: float, process: str) -> "Span":
        """Return the span shifted by ``by_s`` seconds, for a caller that names us ``process``."""
        return Span(
            self.name,
            self.start_at + by_s,
            self.end_at + by_s,
            self.attributes,
            f"{process}/{self.process}" if process and self.process else process or self.process,
        )


class SpanReport(msgspec.Struct, kw_only=True):
    """Reports what a process, and the processes that it called, did for a request."""

    elapsed_s: float  # time between receiving the request and this report
    spans: list[Span]  # seconds since the process got the request
    num_dropped: int = 0  # spans beyond ``MAX_SPANS``

    def placed(self, sent_at: float, received_at: float, process: str) -> list[Span]:
        start_at = sent_at + self.clock_error_s(sent_at, received_at)
        return [span.moved(start_at, process) for span in self.spans]

    def clock_error_s(self, sent_at: float, received_at: float) -> float:
        """Return the largest error of ``placed`` in seconds: half of the time in transit."""
        return max(0.0, received_at - sent_at - self.elapsed_s) / 2


class SpanLog:
    """Records the spans of one request in one process. ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start_at = clock()
        self.spans: list[Span] = []
        self.num_dropped = 0

    def add(
        self, name: str, start_at: float, end_at: float | None = None, /, **attributes: Attribute
    ) -> None:
        """Add a span that ended at ``end_at``, or now. Attributes with value None are left out."""
        if len(self.spans) >= MAX_SPANS:
            self.num_dropped += 1
            return
        known: dict[str, Attribute] = {
            key: value for key, value in attributes.items() if value is not None
        }
        end_at = self.clock() if end_at is None else end_at
        self.spans.append(Span(name, start_at, end_at, known))

    def mark(self, name: str, /, **attributes: Attribute) -> None:
        now_at = self.clock()
        self.add(name, now_at, now_at, **attributes)

    @contextlib.contextmanager
    def measure(self, name: str, /, **attributes: Attribute) -> Iterator[dict[str, Attribute]]:
        """Add a span for the run time of the block, which may add to the yielded attributes."""
        start_at = self.clock()
        try:
            yield attributes
        finally:
            self.add(name, start_at, **attributes)

    def take(
        self, report: SpanReport, *, sent_at: float, received_at: float, process: str = ""
    ) -> None:
        placed = report.placed(sent_at, received_at, process)
        # More than ``MAX_SPANS``: each rank of a TP group reports its READs to the same log.
        num_fitting = max(0, MAX_SPANS * 4 - len(self.spans))
        self.spans += placed[:num_fitting]
        self.num_dropped += report.num_dropped + len(placed[num_fitting:])

    def report(self, process: str = "") -> SpanReport:
        """Return all spans so far; spans without a process name get the name ``process``."""
        return SpanReport(
            elapsed_s=self.clock() - self.start_at,
            spans=[
                span.moved(-self.start_at, "" if span.process else process) for span in self.spans
            ],
            num_dropped=self.num_dropped,
        )
