"""Decides how long an agent may run processes, so that none runs twice.

::

    agent       Beat(stamp) at t0 ─┐                 ┌─▶ Beat(stamp) back: the lease ends at
                                   ▼                 │   t0 + timeout_s
    supervisor             hears it at t1 ≥ t0 ──────┘   at t1 + 1.5 x timeout_s its engines may
                                                         be started elsewhere

The lease counts from when the agent *said* what the supervisor answers, and the supervisor counts
from when it *heard* it. So the order of the two ends holds whichever direction of the link is cut,
and however late messages are. Clocks are compared with themselves alone. That of the agent goes on
while its machine is suspended, as its processes go on afterwards; that of the supervisor need not:
it only waits the longer.
"""

from __future__ import annotations

import time

MAX_BEAT_S = 1.0
_SHARE = 1.5


def beat_s(timeout_s: float) -> float:
    """Return how often both sides say Beat; an agent looks at its lease at least as often."""
    return min(MAX_BEAT_S, timeout_s / 4)


def boot_clock() -> float:
    """Return the seconds since the machine was started, also those in which it was suspended, which
    ``time.monotonic`` leaves out.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ended_by(heard_at: float, timeout_s: float) -> float:
    """Return the instant by which an agent that was heard last then has ended its processes.

    The half of ``timeout_s`` beyond the lease is for the agent to look at it, and to kill.
    """
    return heard_at + _SHARE * timeout_s


class AgentLease:
    """Is an agent's right to run processes; ``asked_at``: when it asked to join."""

    def __init__(self, asked_at: float, timeout_s: float) -> None:
        self._from = asked_at
        self._timeout_s = timeout_s

    def renew(self, stamp: float) -> None:
        """Count from ``stamp``, the instant of a Beat that the supervisor has answered."""
        self._from = max(self._from, stamp)

    def silent_s(self, now: float) -> float | None:
        """Return for how long nothing was answered once the lease has ended, else None."""
        silent_s = now - self._from
        return silent_s if silent_s > self._timeout_s else None
