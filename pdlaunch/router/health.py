"""Decides whether an engine gets requests, by the outcomes of the last ones.

::

    closed ── a request failed ──▶ open ── its time is over ──▶ half-open
      ▲                             ▲                               │ one try at a time
      └───────── success ◀──────────┴── failure: twice as long ◀────┘
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

HealthState = Literal["closed", "open", "half_open"]

OPEN_S = 1.0
MAX_OPEN_S = 30.0
_MAX_DOUBLINGS = 10
TRY_LASTS_S = 5.0  # a try without an answer for this long does not block the next one
# Failures are forgotten after this many successes in a row, so that an engine that fails one
# request in eight stays open longer and longer.
NUM_GOOD = 8


class Breaker(msgspec.Struct, kw_only=True):
    """Counts outcomes of an engine, or of the pulls of a pair. Instants are on the pool's clock."""

    # Failures since the last ``NUM_GOOD`` successes in a row; simultaneous ones count as one.
    num_failures: int = 0
    num_successes: int = 0  # successes in a row
    is_tripped: bool = False  # not closed
    open_until_at: float = 0.0
    tried_until_at: float = 0.0

    def state(self, now_at: float) -> HealthState:
        if not self.is_tripped:
            return "closed"
        return "open" if now_at < self.open_until_at else "half_open"

    def takes(self, now_at: float) -> bool:
        """Return whether a request may be sent: it is closed, or a try is due."""
        return not self.is_tripped or self.wants_try(now_at)

    def wants_try(self, now_at: float) -> bool:
        return self.is_tripped and now_at >= max(self.open_until_at, self.tried_until_at)

    def asked(self, now_at: float) -> None:
        if self.wants_try(now_at):
            self.tried_until_at = now_at + TRY_LASTS_S

    def failed(self, now_at: float) -> None:
        self.num_successes = 0
        # While it is open, failures are those of requests that were sent before.
        if self.state(now_at) == "open":
            return
        open_s = min(MAX_OPEN_S, OPEN_S * 2 ** min(self.num_failures, _MAX_DOUBLINGS))
        self.num_failures += 1
        self.is_tripped, self.open_until_at, self.tried_until_at = True, now_at + open_s, 0.0

    def answers(self, now_at: float) -> None:
        """Record a first token, which closes a half-open engine."""
        # While open, the token belongs to an earlier request. It closes the engine only after a
        # single failure, which was probably the failed request's own fault.
        if self.num_failures <= 1 or now_at >= self.open_until_at:
            self.is_tripped = False

    def succeeded(self, now_at: float) -> None:
        self.answers(now_at)
        self.num_successes += 1
        if self.num_successes >= NUM_GOOD:
            self.num_failures = 0

    def why(self, now_at: float) -> str:
        """Return, for people, why nothing is sent; empty if requests are sent."""
        if self.takes(now_at):
            return ""
        if now_at >= self.open_until_at:
            return "half-open, being tried"
        left_s = self.open_until_at - now_at
        return f"open after {self.num_failures} failures, tried again in {left_s:.1f} s"


class EngineHealth(Breaker, kw_only=True):
    """Counts the requests of an engine, and its pulls from each prefill engine."""

    # By the key of the prefill engine; only engines with a failed pull are here.
    pulls: dict[object, Breaker] = {}

    def pull(self, prefill: object) -> Breaker:
        return self.pulls.get(prefill) or _WELL

    def pulled(self, prefill: object, now_at: float, *, ok: bool) -> None:
        if not ok:
            self.pulls.setdefault(prefill, Breaker()).failed(now_at)
        elif (breaker := self.pulls.get(prefill)) is not None:
            breaker.succeeded(now_at)
            if not breaker.num_failures:
                del self.pulls[prefill]

    def keep(self, prefills: Iterable[object]) -> None:
        if self.pulls:
            self.pulls = {key: self.pulls[key] for key in prefills if key in self.pulls}


_WELL = Breaker()  # shared default; only read, never changed
