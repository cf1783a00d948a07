"""Handles deaths while a launch serves: the unit that has died is started again, or its engine is
given up and tried again later.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from pdlaunch.launch.failure import Failure
from pdlaunch.launch.hosts.host import Host, ProcessExited
from pdlaunch.launch.instance import Instance, Unit
from pdlaunch.launch.registry import Pairs
from pdlaunch.launch.restarts import GivenUp, RestartPolicy
from pdlaunch.launch.states import ProcessState
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import EndReason, Suspects

_LOOK_FOR_ROOM_S = 1.0


class Deaths:
    """Acts on deaths in a launch that serves.

    ``start`` spawns a unit, ``fail`` ends the launch, ``note`` tells people, ``find_room`` says
    whether the host of a unit, or another one, can take it.
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
        find_room: Callable[[Unit, Sequence[Unit]], bool],
    ) -> None:
        self._host = host
        self._find_room = find_room
        self._units = units
        self._pairs = pairs
        self._policy = policy
        self._clock = clock
        self._start = start
        self._fail = fail
        self._note = note
        self._given_up = GivenUp(plan, policy)
        self.ends: dict[str, dict[EndReason, int]] = {
            process.name: {"died": 0, "hung": 0} for process in plan.processes
        }
        """The number of times that each process was the first of its unit to end."""

    def use(self, plan: Plan) -> None:
        """Count on the engines of this plan from now on."""
        self._given_up.use(plan)
        for process in plan.processes:
            self.ends.setdefault(process.name, {"died": 0, "hung": 0})

    def forget(self, engine: str) -> None:
        """Forget the deaths of an engine that is about to be removed."""
        self._given_up.forget(engine)
        self._pairs.try_again(engine)

    @property
    def due_at(self) -> float:
        """Return the instant at which ``tick`` has something to do."""
        due = [
            at for unit in self._units for at in (unit.kill_at, unit.respawn_at) if at is not None
        ]
        return min([*due, self._given_up.due_at])

    def exited(self, unit: Unit, instance: Instance, event: ProcessExited) -> None:
        """Handle the end of a process that should live.

        The rest of its unit is killed; once none of it is left, the unit is started again or given
        up.
        """
        instance.move(ProcessState.FAILED)
        self._pairs.forget(instance.name)
        # The first to die is the cause; the others die of it, or are killed for it.
        if unit.cause is None:
            unit.cause = instance
            unit.lost_with = event.lost_with
            self.ends[instance.name]["died"] += 1
            # Told first: a router that sees the engine leave repeats its requests at once, and must
            # know by then which of them may have been the cause.
            self.tell(unit, instance, event)
            self.kill(unit)
        instance.error = instance.error or event.how()
        if unit.alive:
            return
        if unit.engine in self._given_up:
            self._bury(unit)
        else:
            self._back_off(unit, unit.cause)

    def hung(self, unit: Unit, instance: Instance) -> None:
        """Kill the unit of a process that hangs; SIGKILL reaches a stopped process too."""
        if unit.cause is None:
            unit.cause = instance
            self.ends[instance.name]["hung"] += 1
            silent_s = self._clock() - instance.heard_at
            instance.error = f"hung: its loop did not turn for {silent_s:.0f} s (hang_timeout_s)"
            self._note(f"{instance.label} {instance.error}: killed")
            self.kill(unit)

    def tell(self, unit: Unit, instance: Instance, event: ProcessExited) -> None:
        """Tell people of the first death of a unit, and the router of what a rank may have died
        of.
        """
        said = f": {instance.error}" if instance.error else ""
        self._note(f"{instance.label} {event.how()}{said}")
        # A rank that never served, or that somebody killed, has died of no request.
        if instance.spec.kind == "rank" and unit.ready_at is not None and event.by_itself:
            self._tell_suspects(unit.engine)

    def _tell_suspects(self, engine: str) -> None:
        """Send the router the requests of the engine's last step, before it repeats them at another
        engine.
        """
        step = self._host.last_step(engine)
        if not step.origins:
            return
        suspects = Suspects(origins=sorted(step.origins), repeated=sorted(step.suspects))
        for unit in self._units:
            for member in unit.members:
                if member.spec.kind == "router":
                    self._host.send(member.name, suspects)

    def ready(self, unit: Unit) -> None:
        """Note that all members of a unit are ready."""
        if all(other.ready for other in self._units_of(unit.engine)):
            self._given_up.serves(unit.engine)

    def forgive(self, engine: str) -> None:
        """Forget the deaths of an engine that is about to be restarted because somebody asked."""
        self._note(f"{engine} is restarted, as was asked")
        self._given_up.forgive(engine)
        self._pairs.try_again(engine)

    def start(self, unit: Unit) -> None:
        """Start a unit that has ended where there is room for it, or once there is."""
        if self._find_room(unit, self._units):
            self._start(unit)
        else:
            unit.respawn_at = self._clock() + _LOOK_FOR_ROOM_S
            self._note(f"{unit.name} waits until its host is back, or another one has room")

    def tick(self) -> None:
        for engine in self._given_up.due(self._clock()):
            self._try_again(engine)
        for unit in self._units:
            self._tick_unit(unit)

    def kill(self, unit: Unit) -> None:
        """Kill the members of a unit that live; they leave the registry at once."""
        for member in unit.members:
            if member.alive:
                # Now, and not when it has ended: until they hear of it, peers go on asking it.
                member.registration = None
                self._host.signal(member.name, signal.SIGKILL)

    def _back_off(self, unit: Unit, cause: Instance) -> None:
        now = self._clock()
        if unit.lost_with:
            # It died of its host and not of itself, so this counts for nothing.
            unit.kill_at, unit.respawn_at = None, now
            for member in unit.members:
                member.move(ProcessState.BACKING_OFF)
            self._note(f"{unit.name} waits until its host is back, or another one has room")
            return
        # Time in which it hung was no service.
        worked_until = cause.heard_at if cause.stalled else now
        ready_for_s = None if unit.ready_at is None else worked_until - unit.ready_at
        if self._policy.is_quick(ready_for_s):
            unit.num_quick_deaths += 1
        else:
            unit.num_quick_deaths = 1
            self._given_up.served_long(unit.engine)
        unit.kill_at = None
        delay_s = self._policy.delay_s(unit.num_quick_deaths)
        if delay_s is None:
            self._give_up(unit, cause)
            return
        for member in unit.members:
            member.move(ProcessState.BACKING_OFF)
        unit.respawn_at = now + delay_s
        self._note(f"{unit.name} starts again in {delay_s:g} s")

    def _give_up(self, unit: Unit, cause: Instance) -> None:
        """Leave the work of an engine that always dies to the others of its role; without any the
        launch is over.

        Deaths by SIGKILL count as well: the kernel sends it to a process that takes too much
        memory.
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
            other.kill_at = other.respawn_at = None
            # With a cause, its members die without being reported one by one.
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
        """Start the processes of an engine that was given up.

        One quick death of a unit is enough to give it up again, for longer.
        """
        units = self._units_of(engine)
        has_room = all(self._find_room(unit, self._units) for unit in units)
        if any(unit.alive for unit in units) or not has_room:
            self._given_up.postpone(engine, self._clock() + 1.0)
            return
        self._note(f"{engine} is tried again")
        self._given_up.try_again(engine)
        self._pairs.try_again(engine)
        for unit in units:
            unit.num_quick_deaths = self._policy.max_quick_deaths - 1
            self._start(unit)

    def _tick_unit(self, unit: Unit) -> None:
        now = self._clock()
        if unit.respawn_at is not None and now >= unit.respawn_at:
            if self._find_room(unit, self._units):
                self._start(unit)
            else:
                unit.respawn_at = now + _LOOK_FOR_ROOM_S
        elif unit.kill_at is not None and now >= unit.kill_at:
            unit.kill_at = None
            self._note(f"{unit.name} neither became ready nor left in time: killed")
            self.kill(unit)

    def _units_of(self, engine: str) -> list[Unit]:
        return [unit for unit in self._units if unit.engine == engine]
