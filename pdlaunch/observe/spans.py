"""Records what processes do for one request, as spans on one clock.

Each process has a ``SpanLog`` of its own for a request. With its answer it hands a ``SpanReport``
to whoever asked it, who places the report on a clock of its own::

    asker     sent ├──────────────────────────────────────────┤ received
    process          received ├─ its spans, seconds from here ─┤ reported
                   └ half of what is left over on each side ──┘

So no two clocks are ever compared, and the error is at most half of the time on the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

Attribute = str | int | float | bool | None

MAX_SPANS = 128  # spans of its own that one process keeps for one request; further ones are counted

QUEUE = "queue"  # names the wait for a place in the batch
PREFILL = "prefill"  # names what one step computes of a prompt; ``tokens`` says how many
PULL = "pull"  # names a pull, from when its lease was known: ``bytes``, ``gb_s``, ``verified``
# Names the instant at which a request gets into the batch: ``device_tokens``, ``host_tokens`` and
# ``remote_tokens`` of its prompt are not computed here.
SEATED = "seated"


class Span(msgspec.Struct):
    """Says what a process did from one instant to another; at an instant alone they are equal."""

    name: str
    start_at: float  # seconds on the clock of whoever holds it
    end_at: float
    attributes: dict[str, Attribute] = {}
    # Name of the process, given by the process that received the span; empty for its own spans.
    # Nested: decode-0/rank-0.
    process: str = ""

    @property
    def duration_s(self) -> float:
        return self.end_at - self.start_at

    def moved(self, by_s: float, process: str) -> Span:
        """Return it on another clock, as somebody holds it who calls its holder ``process``."""
        return Span(
            self.name,
            self.start_at + by_s,
            self.end_at + by_s,
            self.attributes,
            f"{process}/{self.process}" if process and self.process else process or self.process,
        )


class SpanReport(msgspec.Struct, kw_only=True):
    """Tells what a process, and those that it asked, did for a request."""

    elapsed_s: float  # time from when the process got the request until it reported
    spans: list[Span]  # seconds since the process got the request
    num_dropped: int = 0  # spans beyond ``MAX_SPANS``

    def placed(self, sent_at: float, received_at: float, process: str) -> list[Span]:
        """Return the spans on the clock of the asker, who sent and received at these instants."""
        start_at = sent_at + self.clock_error_s(sent_at, received_at)
        return [span.moved(start_at, process) for span in self.spans]

    def clock_error_s(self, sent_at: float, received_at: float) -> float:
        """Return by how much the places may be wrong: half of the time on the way."""
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
        """Add a span that ended at ``end_at``, or now. Attributes that are None are left out."""
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
        """Add the span that the block takes, also when it raises.

        Yields its attributes, to which the block may add.
        """
        start_at = self.clock()
        try:
            yield attributes
        finally:
            self.add(name, start_at, **attributes)

    def take(
        self, report: SpanReport, *, sent_at: float, received_at: float, process: str = ""
    ) -> None:
        """Add what ``process`` reports of a request that it was sent."""
        placed = report.placed(sent_at, received_at, process)
        # More than of its own: each rank of a TP group reports its READs to the same log.
        num_fitting = max(0, MAX_SPANS * 4 - len(self.spans))
        self.spans += placed[:num_fitting]
        self.num_dropped += report.num_dropped + len(placed[num_fitting:])

    def report(self, process: str = "") -> SpanReport:
        """Return all spans until now; ``process`` names those that have no name yet."""
        return SpanReport(
            elapsed_s=self.clock() - self.start_at,
            spans=[
                span.moved(-self.start_at, "" if span.process else process) for span in self.spans
            ],
            num_dropped=self.num_dropped,
        )
