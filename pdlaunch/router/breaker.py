"""Decides whether an engine, or a pair of engines, gets requests, by how the last ones went.

::

    closed ── a request failed ──▶ open ── its time is over ──▶ half-open
      ▲                             ▲                               │ one try at a time
      └───────── success ◀──────────┴── failure: twice as long ◀────┘
"""

from __future__ import annotations

from typing import Literal

import msgspec

BreakerState = Literal["closed", "open", "half_open"]

OPEN_S = 1.0
MAX_OPEN_S = 30.0
_MAX_DOUBLINGS = 10
"""Doublings past the longest time are not counted, so that no number overflows."""
TRY_LASTS_S = 5.0
"""Time after which a try that has said nothing does not keep off the next one."""
NUM_GOOD = 8
"""Failures are forgotten after so many successes in a row. So who fails one request in eight, or
more, stays open longer and longer, whatever it answers in between.
"""


class Breaker(msgspec.Struct, kw_only=True):
    """Counts outcomes. Instants are on the caller's clock."""

    num_failures: int = 0
    """Failures since the last ``NUM_GOOD`` successes in a row; of those that came at once, one."""
    num_successes: int = 0
    """Successes in a row."""
    is_tripped: bool = False
    """It is not closed."""
    open_until_at: float = 0.0
    tried_until_at: float = 0.0

    def state(self, now_at: float) -> BreakerState:
        if not self.is_tripped:
            return "closed"
        return "open" if now_at < self.open_until_at else "half_open"

    def takes(self, now_at: float) -> bool:
        """Tell whether a request may be sent: it is closed, or a try is due."""
        return not self.is_tripped or self.wants_try(now_at)

    def wants_try(self, now_at: float) -> bool:
        """Tell whether the next request is to find out if all is well again."""
        return self.is_tripped and now_at >= max(self.open_until_at, self.tried_until_at)

    def asked(self, now_at: float) -> None:
        """Note that a request is sent."""
        if self.wants_try(now_at):
            self.tried_until_at = now_at + TRY_LASTS_S

    def failed(self, now_at: float) -> None:
        """Open, each time for twice as long.

        While it is open, what fails was sent before: that adds nothing.
        """
        self.num_successes = 0
        if self.state(now_at) == "open":
            return
        open_s = min(MAX_OPEN_S, OPEN_S * 2 ** min(self.num_failures, _MAX_DOUBLINGS))
        self.num_failures += 1
        self.is_tripped, self.open_until_at, self.tried_until_at = True, now_at + open_s, 0.0

    def answers(self, now_at: float) -> None:
        """Note that a first token has come, which is all that a try waits for.

        What comes while it is open was sent before. It closes it only after a single failure,
        which was probably the request's own.
        """
        if self.num_failures <= 1 or now_at >= self.open_until_at:
            self.is_tripped = False

    def succeeded(self, now_at: float) -> None:
        """Note that a request was answered to its end."""
        self.answers(now_at)
        self.num_successes += 1
        if self.num_successes >= NUM_GOOD:
            self.num_failures = 0

    def why(self, now_at: float) -> str:
        """Say for people why nothing is sent; empty when something is."""
        if self.takes(now_at):
            return ""
        if now_at >= self.open_until_at:
            return "half-open, being tried"
        left_s = self.open_until_at - now_at
        return f"open after {self.num_failures} failures, tried again in {left_s:.1f} s"
