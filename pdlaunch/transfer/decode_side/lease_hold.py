"""Knows until when a lease holds, and when the prefill rank has to be asked by a heartbeat.

::

    asked_at ........ answer: lease_s seconds are left ........ asked_at + lease_s
       │   the lease holds at least as long, whenever the answer was made   │
"""

from __future__ import annotations

from collections.abc import Callable

HEARTBEATS_A_LEASE = 4


class LeaseHold:
    """Follows one lease at one prefill rank; who owns it sends the heartbeats when they are due."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.next_heartbeat_at: float | None = None
        self._clock = clock
        self._held_until_at = 0.0
        """Instant until which the lease is known to hold."""
        self._interval_s = 0.0
        """Time between two heartbeats, once there is a lease."""
        self._last_sent_at = self._last_answered_at = 0.0
        """Instants at which the last heartbeat, and the last one that was answered, were sent."""

    def begin(self, asked_at: float, lease_s: float) -> None:
        """Take in the lease, as the answer to the question of ``asked_at`` states it."""
        self._held_until_at = asked_at + lease_s
        self._interval_s = lease_s / HEARTBEATS_A_LEASE
        # Due one interval after the question; at once, where the answer took longer.
        self.next_heartbeat_at = max(self._clock(), asked_at + self._interval_s)

    def sent(self, sent_at: float) -> None:
        """Note that a heartbeat was sent. The next one is due an interval later."""
        self._last_sent_at = sent_at
        self.next_heartbeat_at = sent_at + self._interval_s

    def answered(self, sent_at: float) -> None:
        """Note that the heartbeat of ``sent_at`` was answered."""
        self._last_answered_at = max(self._last_answered_at, sent_at)

    def extend(self, sent_at: float, lease_s: float) -> None:
        """Take in how long the lease holds. The next heartbeat is due an interval from now."""
        self._held_until_at = sent_at + lease_s
        self.next_heartbeat_at = self._clock() + self._interval_s

    def ask_now(self) -> None:
        """Have a heartbeat sent as soon as possible."""
        self.next_heartbeat_at = self._clock()

    def stop(self) -> None:
        """Have no heartbeat sent until there is a lease again."""
        self.next_heartbeat_at = None

    def is_confirmed_after(self, instant_at: float) -> bool:
        """Return whether a heartbeat from after the instant was answered. If none has been sent
        since, one is due now.
        """
        if self._last_answered_at >= instant_at:
            return True
        if self._last_sent_at < instant_at:
            self.ask_now()
        return False

    def held_at(self, instant_at: float) -> bool:
        """Return whether the lease is known to have held at this instant."""
        return instant_at < self._held_until_at
