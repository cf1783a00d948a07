"""Decides when a unit that has died is started again, and which engines are given up.

::

    serves ── many quick deaths ──▶ given up ── 1, 2, 4 .. minutes ──▶ on trial ── ready ──▶ serves
                                       ▲──────── one quick death ─────────┘

An engine that was given up is left alone for a while, longer each time. The count of waits begins
anew once the engine has served for long enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdlaunch.config.roles import ROLES, Role
from pdlaunch.launch.instance import Instance
from pdlaunch.planning.plan import Plan

_MAX_DOUBLINGS = 32
"""Keeps the delay from overflowing, however often an engine is given up."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Sets the exponential back-off, until too many deaths in a row came too quickly."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    quick_s: float = 60.0
    """A death within this time of being ready, or before it, is a quick one; a later one starts the
    count anew.
    """
    max_quick_deaths: int = 5
    first_retry_s: float = 60.0
    max_retry_s: float = 900.0
    """Seconds for which an engine that was given up is left alone: twice as long each time, up to
    this.
    """

    def is_quick(self, ready_for_s: float | None) -> bool:
        return ready_for_s is None or ready_for_s < self.quick_s

    def delay_s(self, num_quick_deaths: int) -> float | None:
        """Return the seconds until the next start after so many quick deaths in a row; None: give
        up.
        """
        if num_quick_deaths >= self.max_quick_deaths:
            return None
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** max(0, num_quick_deaths - 1)))

    def retry_delay_s(self, num_times: int) -> float:
        """Return the seconds until an engine is tried again that was given up so many times in a
        row.

        ``num_times``: 1 or more.
        """
        doublings = min(num_times - 1, _MAX_DOUBLINGS)
        return float(min(self.max_retry_s, self.first_retry_s * 2**doublings))


class GivenUp:
    """Keeps which engines do not serve, why, and when they are tried again.

    ``in`` asks for an engine that is given up and not on trial.
    """

    def __init__(self, plan: Plan, policy: RestartPolicy) -> None:
        self.use(plan)
        self._policy = policy
        self._why: dict[str, str] = {}
        """Reasons of the engines that are given up or on trial."""
        self._retry_at: dict[str, float] = {}
        self._num_times: dict[str, int] = {}
        """The number of times an engine was given up in a row, without long service between."""

    def __contains__(self, engine: str) -> bool:
        return engine in self._retry_at

    def use(self, plan: Plan) -> None:
        """Count on the engines that there are from now on."""
        self._engines = {role: plan.engines(role) for role in ROLES}

    @property
    def due_at(self) -> float:
        """Return the instant at which the next engine is to be tried again; infinity: none."""
        return min(self._retry_at.values(), default=math.inf)

    def due(self, now: float) -> list[str]:
        return [engine for engine, at_s in self._retry_at.items() if now >= at_s]

    def add(self, cause: Instance, summary: str, now: float) -> float:
        """Give an engine up; return how long it is left alone.

        ``cause``: the process whose deaths were too many.
        """
        engine = cause.spec.engine
        self._why[engine] = summary + (f": {cause.error}" if cause.error else "")
        self._num_times[engine] = self._num_times.get(engine, 0) + 1
        delay_s = self._policy.retry_delay_s(self._num_times[engine])
        self._retry_at[engine] = now + delay_s
        return delay_s

    def postpone(self, engine: str, at_s: float) -> None:
        """Wait longer with an engine some of whose processes have not died yet."""
        self._retry_at[engine] = at_s

    def try_again(self, engine: str) -> None:
        """Put an engine on trial: until it serves it counts for nothing."""
        del self._retry_at[engine]

    def serves(self, engine: str) -> None:
        """Note that all processes of an engine are ready."""
        self._why.pop(engine, None)

    def forgive(self, engine: str) -> None:
        """Treat the engine as if it had never been given up; until it serves it does not count."""
        self._retry_at.pop(engine, None)
        self.served_long(engine)

    def forget(self, engine: str) -> None:
        """Forget an engine that is gone for good."""
        self.forgive(engine)
        self._why.pop(engine, None)

    def served_long(self, engine: str) -> None:
        """Begin the count of waits anew."""
        self._num_times.pop(engine, None)

    def left_of(self, role: Role | None) -> list[str]:
        """Return the engines that can do the work of a role and serve; the router has no role and
        none.

        Engines of both roles can do all work, and so can a pair.
        """
        if role is None:
            return []
        serving = {
            each: [engine for engine in engines if engine not in self._why]
            for each, engines in self._engines.items()
        }
        if serving[role]:
            return serving[role]
        pair = serving["prefill"] + serving["decode"]
        is_whole = bool(serving["prefill"] and serving["decode"])
        return serving["both"] or (pair if is_whole else [])

    def details(self, last: Instance) -> list[str]:
        """Return lines that tell what became of other engines that could have done its work, once
        ``last`` is gone too.
        """
        others = [] if last.spec.role is None else self._engines[last.spec.role]
        if self._engines["both"]:
            others = [engine for engines in self._engines.values() for engine in engines]
        return [
            f"  before that, {self._why[engine]}"
            for engine in others
            if engine != last.spec.engine and engine in self._why
        ]
