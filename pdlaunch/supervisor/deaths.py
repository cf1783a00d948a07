"""Decides what becomes of a unit that has died: it is started again, given up, or tried again
later.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from pdlaunch.hosts.host import Host
from pdlaunch.resolve.plan import Plan
from pdlaunch.supervisor.failure import Failure
from pdlaunch.supervisor.instance import Instance, Unit
from pdlaunch.supervisor.registry import Pairs
from pdlaunch.supervisor.restarts import GivenUp, RestartPolicy
from pdlaunch.supervisor.states import ProcessState


class Deaths:
    """Acts on units of a launch that serves. ``start``: spawns one; ``fail``: ends the launch;
    ``note``: tells people.
    """

    def __init__(
        self,
        plan: Plan,
        host: Host,
        units: Sequence[Unit],
        pairs: Pairs,
        policy: RestartPolicy,
        clock: Callable[[], float],
        *,
        start: Callable[[Unit], None],
        fail: Callable[[Failure], None],
        note: Callable[[str], None],
    ) -> None:
        self._host = host
        self._units = units
        self._pairs = pairs
        self._policy = policy
        self._clock = clock
        self._start = start
        self._fail = fail
        self._note = note
        self._given_up = GivenUp(plan, policy)

    @property
    def due_s(self) -> float:
        """When ``tick`` has something to do."""
        times_s = [
            time_s
            for unit in self._units
            for time_s in (unit.deadline_s, unit.respawn_at_s)
            if time_s is not None
        ]
        return min([*times_s, self._given_up.due_s])

    def died(self, unit: Unit, cause: Instance) -> None:
        """No member of the unit is alive any more; ``cause`` was the first to die."""
        if unit.engine in self._given_up:
            self._bury(unit)
        else:
            self._back_off(unit, cause)

    def ready(self, unit: Unit) -> None:
        """All members of the unit are ready."""
        if all(other.ready for other in self._units_of(unit.engine)):
            self._given_up.serves(unit.engine)

    def forgive(self, engine: str) -> None:
        """It is about to be restarted, whatever it has done before."""
        self._note(f"{engine} is restarted, as was asked")
        self._given_up.forgive(engine)
        self._pairs.try_again(engine)

    def tick(self) -> None:
        for engine in self._given_up.due(self._clock()):
            self._try_again(engine)
        for unit in self._units:
            self._tick_unit(unit)

    def kill(self, unit: Unit) -> None:
        """The rest of a unit goes with its first death, and leaves the registry at once."""
        for member in unit.members:
            if member.alive:
                member.registration = None
                self._host.signal(member.name, signal.SIGKILL)

    def _back_off(self, unit: Unit, cause: Instance) -> None:
        now_s = self._clock()
        worked_until_s = cause.heard_at_s if cause.stalled else now_s
        ready_for_s = None if unit.ready_since_s is None else worked_until_s - unit.ready_since_s
        if self._policy.is_quick(ready_for_s):
            unit.num_quick_deaths += 1
        else:
            unit.num_quick_deaths = 1
            self._given_up.served_long(unit.engine)
        unit.deadline_s = None
        delay_s = self._policy.delay_s(unit.num_quick_deaths)
        if delay_s is None:
            self._give_up(unit, cause)
            return
        for member in unit.members:
            member.move(ProcessState.BACKING_OFF)
        unit.respawn_at_s = now_s + delay_s
        self._note(f"{unit.name} starts again in {delay_s:g} s")

    def _give_up(self, unit: Unit, cause: Instance) -> None:
        """An engine that always dies leaves the others of its role alone with the work; without one
        the launch is over.

        Deaths by SIGKILL count as well: it is what the kernel sends to a process that takes too
        much memory.
        """
        times = (
            f"{unit.num_quick_deaths} times in a row, each within {self._policy.quick_s:g} s of "
            "its start"
        )
        summary = f"{unit.name} died {times}"
        delay_s = self._given_up.add(cause, summary, self._clock())
        left = self._given_up.left_of(cause.spec.role)
        if not left:
            self._fail(
                Failure(
                    summary,
                    process=cause.name,
                    said=cause.error or "",
                    details=self._given_up.details(cause),
                )
            )
            return
        self._note(
            f"{summary}: {unit.engine} is given up and tried again in {delay_s:g} s, "
            f"{', '.join(left)} serves on"
        )
        self._pairs.give_up(unit.engine)
        for other in self._units_of(unit.engine):
            for member in other.members:
                member.given_up_for = (
                    f"{summary}"
                    + (f": {cause.error}" if cause.error else "")
                    + f"; tried again {delay_s:g} s later"
                )
            other.deadline_s = other.respawn_at_s = None
            other.cause = other.cause or cause
            if other.alive:
                self.kill(other)
            else:
                self._bury(other)

    def _bury(self, unit: Unit) -> None:
        for member in unit.members:
            member.registration = None
            member.move(ProcessState.GIVEN_UP)

    def _try_again(self, engine: str) -> None:
        """One quick death of each unit is enough to give it up again, for longer."""
        units = self._units_of(engine)
        if any(unit.alive for unit in units):
            self._given_up.postpone(engine, self._clock() + 1.0)
            return
        self._note(f"{engine} is tried again")
        self._given_up.try_again(engine)
        self._pairs.try_again(engine)
        for unit in units:
            unit.num_quick_deaths = self._policy.max_quick_deaths - 1
            self._start(unit)

    def _tick_unit(self, unit: Unit) -> None:
        now_s = self._clock()
        if unit.respawn_at_s is not None and now_s >= unit.respawn_at_s:
            self._start(unit)
        elif unit.deadline_s is not None and now_s >= unit.deadline_s:
            unit.deadline_s = None
            self._note(f"{unit.name} neither became ready nor left in time: killed")
            self.kill(unit)

    def _units_of(self, engine: str) -> list[Unit]:
        return [unit for unit in self._units if unit.engine == engine]
