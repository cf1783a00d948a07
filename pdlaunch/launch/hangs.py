"""Notices processes that hang: they are ready, and their main loop has not turned for too long.

The supervisor may have been stopped itself (Ctrl-Z, a frozen container). Then nobody could be
heard, and everyone gets all of the time again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdlaunch.launch.instance import Instance
from pdlaunch.launch.states import ProcessState

_PARTS = 6
"""A process speaks, and the supervisor looks, this many times within the limit."""


def heartbeat_s(timeout_s: float) -> float:
    """Return how often a process says Alive; 0: never."""
    return timeout_s / _PARTS


@dataclass(frozen=True, slots=True)
class HangLimits:
    """Sets the longest silence of a process that is ready."""

    timeout_s: float = 0.0
    """Limit for a process that is awake; 0: nobody is watched."""
    asleep_s: float = 600.0
    """Limit for a process that sleeps: it may be loading its weights again."""

    def of(self, instance: Instance) -> float:
        return (
            self.timeout_s
            if instance.sleep_state == "awake"
            else max(self.timeout_s, self.asleep_s)
        )


class HangWatch:
    """Records when instances were heard; ``look`` finds those that hang, at ``due_at``."""

    def __init__(self, limits: HangLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._interval_s = heartbeat_s(limits.timeout_s) or math.inf
        self._looked_at = clock()

    @property
    def due_at(self) -> float:
        """Return the instant at which ``look`` looks again; infinity: it never does."""
        return self._looked_at + self._interval_s

    def heard(self, instance: Instance) -> None:
        """Note that the loop of a process has turned."""
        instance.heard_at = self._clock()
        instance.stalled = False

    def look(self, instances: Iterable[Instance]) -> list[Instance]:
        """Mark processes that were silent for half of their time as stalled.

        Returns those that were silent for all of it, the longest first.
        """
        now = self._clock()
        if now < self.due_at:
            return []
        # This process itself was stopped or starved if it looks so much later than it meant to.
        overslept = now - self._looked_at > 3 * self._interval_s
        self._looked_at = now
        watched = [instance for instance in instances if instance.state is ProcessState.READY]
        for instance in watched:
            # Nobody could be heard while this process was stopped itself.
            if overslept:
                self.heard(instance)
            instance.stalled = now - instance.heard_at >= self._limits.of(instance) / 2
        hanging = [
            instance for instance in watched if now - instance.heard_at >= self._limits.of(instance)
        ]
        return sorted(hanging, key=lambda instance: instance.heard_at)
