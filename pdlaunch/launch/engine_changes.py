"""Changes the engines of a launch that serves: adds some, stops others, or turns one's role.

::

    asked ── judged ──▶ starting ── ready and proven: joined ──▶ stopping ── all ended ──▶ done
                │           └── one dies, or is late ──▶ the new ones are stopped ──▶ failed
                └── the new need what the old have ──▶ stopping ──▶ starting ──▶ done

One change at a time. A new engine is listed from its start, so that pairs can be proven, and given
work once they are. An engine that stops is given no new work, finishes what runs, and is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.change_plan import EngineChange
from pdlaunch.launch.engine_restarts import EngineRestarts
from pdlaunch.launch.hosts.host import Host, ProcessExited
from pdlaunch.launch.instance import (
    Instance,
    Unit,
    find_engine,
    server_of,
    serving,
    unknown_engine,
)
from pdlaunch.launch.processes import LaunchProcesses
from pdlaunch.launch.registry import Pairs
from pdlaunch.launch.states import LaunchPhase
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.changes import Answered, ChangeEngines, RefusalCode
from pdlaunch.protocol.control import PairFailed


class EnginePlanner(Protocol):
    """Knows where engines can run, and is told of those that come and go."""

    def plan(self, wanted: ChangeEngines, units: Sequence[Unit]) -> EngineChange:
        """Plan a change. Raises ConfigError with the reason why it cannot be."""

    def begin(self, change: EngineChange) -> Sequence[ProcessSpec]:
        """Take over the launch as it will be; return the processes of the engines that start."""

    def forget(self, engine: str) -> None:
        """Forget an engine that is gone, whether it ever served or not."""


@dataclass(slots=True)
class _Running:
    change: EngineChange
    question: int
    asker: str
    drain_s: float
    joining: set[str] = field(default_factory=set)
    """Engines that start and are given no work yet."""
    leaving: set[str] = field(default_factory=set)
    deadline_at: float | None = None
    """Instant by which the engines that start must have joined; None: none starts."""
    error: str = ""

    @property
    def what(self) -> str:
        """Say in words what is changed."""
        starts = [f"+{engine.name}" for engine in self.change.starts]
        return " ".join([*starts, *(f"-{engine}" for engine in self.change.stops)])


class EngineChanges:
    """Keeps the change that is under way; ``in`` asks for an engine that starts because of it.

    ``planner`` is None where engines cannot change. ``answer`` tells a process once all processes
    know what has changed. ``use_plan`` is called when processes have come or gone; ``forget`` with
    an engine that leaves.
    """

    def __init__(
        self,
        processes: LaunchProcesses,
        host: Host,
        restarts: EngineRestarts,
        pairs: Pairs,
        clock: Callable[[], float],
        *,
        planner: EnginePlanner | None,
        drain_s: float,
        startup_timeout_s: float,
        note: Callable[[str], None],
        answer: Callable[[str, Answered], None],
        use_plan: Callable[[], None],
        forget: Callable[[str], None],
    ) -> None:
        self._processes = processes
        self._host = host
        self._restarts = restarts
        self._pairs = pairs
        self._clock = clock
        self._planner = planner
        self._drain_s = drain_s
        self._startup_timeout_s = startup_timeout_s
        self._note = note
        self._answer = answer
        self._use_plan = use_plan
        self._forget = forget
        self._running: _Running | None = None

    def __contains__(self, engine: str) -> bool:
        return self._running is not None and engine in self._running.joining

    @property
    def due_at(self) -> float:
        """Return the instant at which ``tick`` has something to do by itself; infinity: none."""
        deadline_at = None if self._running is None else self._running.deadline_at
        return math.inf if deadline_at is None else deadline_at

    def ask(self, message: ChangeEngines, asker: str, phase: LaunchPhase) -> None:
        """Judge a change and tell who asked, then begin it unless it is a dry run."""
        answer, change = self._judge(message, phase)
        self._answer(asker, answer)
        if change is None or answer.change is None:
            return
        self._running = _Running(change, message.question, asker, answer.change.drain_s)
        self._note(f"engines change, as was asked: {self._running.what}")
        if change.stops_first:
            self._stop(change.stops)
        else:
            self._start()

    def _judge(
        self, message: ChangeEngines, phase: LaunchPhase
    ) -> tuple[Answered, EngineChange | None]:
        """Return the answer, and the change that is to begin."""

        def refused(code: RefusalCode, error: str) -> tuple[Answered, None]:
            return Answered(question=message.question, code=code, error=error), None

        if phase is not LaunchPhase.READY:
            return refused("not_now", f"engines cannot change: the launch is {phase}")
        if self._planner is None:
            return refused("refused", "the engines of this launch cannot change")
        if self._running is not None and not message.dry_run:
            return refused(
                "not_now",
                f"another change is under way: {self._running.what}; `pdlaunch status` shows when "
                "it is done",
            )
        if message.turn:
            engine = find_engine(self._processes.units, message.turn)
            if not engine:
                return refused(
                    "engine_not_found", unknown_engine(self._processes.units, message.turn)
                )
            message = msgspec.structs.replace(message, turn=engine)
        try:
            change = self._planner.plan(message, self._processes.units)
        except PdlaunchError as error:
            fix = getattr(error, "fix", None)
            return refused("refused", f"{error}{f'; fix: {fix}' if fix else ''}")
        drain_s = self._drain_s if message.drain_s is None else message.drain_s
        begun = Answered(
            question=message.question,
            change=change.planned(drain_s),
            notes=list(change.notes),
        )
        if not change.starts and not change.stops:
            begun.notes.append("there is nothing to do: the engines are as you want them")
            return begun, None
        if reason := self._why_not(change):
            return refused("refused", reason)
        if busy := [engine for engine in change.stops if engine in self._restarts]:
            return refused("not_now", f"{busy[0]} is being restarted")
        begun.is_done = message.dry_run
        return begun, None if message.dry_run else change

    def _why_not(self, change: EngineChange) -> str:
        """Say why nobody would serve meanwhile; empty: somebody does."""
        there = {server.name for server in serving(self._processes.units)}
        if there.difference(change.stops) or (change.starts and not change.stops_first):
            return ""
        names = ", ".join(change.stops)
        return (
            f"{names}: no other engine serves, so that requests would fail meanwhile; add one "
            "first, or undrain or restart another one"
        )

    # Events

    def tick(self) -> None:
        """Give new engines work once they are ready and proven, and give up on those that are
        late.
        """
        running = self._running
        if running is None or not running.joining:
            return
        missing = self._missing(running.joining)
        if missing is not None and not missing:
            self._join(running)
        elif running.deadline_at is not None and self._clock() >= running.deadline_at:
            words = "; ".join(missing or self._unready(running.joining))
            self._fail(f"not ready after {self._startup_timeout_s:g} s: {words}")

    def exited(self, instance: Instance, event: ProcessExited) -> None:
        """Handle the end of a process of a new engine: the change has failed."""
        said = f": {instance.error}" if instance.error else ""
        self._fail(f"{instance.label} {event.how()}{said}")

    def pair_failed(self, instance: Instance, pair: PairFailed) -> None:
        """Fail where a new engine and another one can never share KV blocks."""
        ends = {instance.spec.engine, pair.peer.partition("/")[0]}
        if pair.fatal and self._running is not None and ends & self._running.joining:
            self._fail(f"{instance.label} cannot use {pair.peer}: {pair.error}")

    # Steps

    def _start(self) -> None:
        running = self._running
        assert running is not None
        assert self._planner is not None
        running.joining = {engine.name for engine in running.change.starts}
        if not running.joining:
            self._advance()
            return
        running.deadline_at = self._clock() + self._startup_timeout_s
        units = self._processes.add(self._planner.begin(running.change))
        for engine in running.joining:
            server_of(units, engine).withheld = "joining"
        self._use_plan()
        self._processes.spawn_all(units)

    def _join(self, running: _Running) -> None:
        for engine in running.joining:
            server_of(self._processes.units, engine).withheld = ""
            self._note(f"{engine} has joined")
        running.joining = set()
        running.deadline_at = None
        self._advance()

    def _stop(self, engines: Sequence[str]) -> None:
        """Drain and stop engines; all are told before the first can be gone."""
        running = self._running
        assert running is not None
        running.leaving = set(engines)
        for engine in engines:
            server_of(self._processes.units, engine).withheld = "leaving"
            self._forget(engine)
        for engine in engines:
            self._restarts.retire(engine, running.drain_s, partial(self._gone, engine))

    def _gone(self, engine: str) -> None:
        running = self._running
        assert running is not None
        assert self._planner is not None
        for unit in self._processes.units_of(engine):
            for member in unit.members:
                self._pairs.forget(member.name)
        self._processes.remove(engine)
        self._planner.forget(engine)
        self._host.forget(engine)
        self._use_plan()
        self._note(f"{engine} is gone")
        running.leaving.discard(engine)
        if not running.leaving:
            self._advance()

    def _advance(self) -> None:
        """Do the next step, or end: what has been joined or has gone tells where it stands."""
        running = self._running
        assert running is not None
        there = {unit.engine for unit in self._processes.units}
        if not running.error and not all(each.name in there for each in running.change.starts):
            self._start()
        elif not running.error and (left := [e for e in running.change.stops if e in there]):
            self._stop(left)
        else:
            self._running = None
            self._note(running.error or f"engines have changed: {running.what}")
            self._answer(running.asker, Answered(question=running.question, error=running.error))

    def _fail(self, reason: str) -> None:
        """Stop the new engines at once; those that were there serve on."""
        running = self._running
        assert running is not None
        gone = [engine for engine in running.change.stops if self._is_gone(engine)]
        names = ", ".join(sorted(running.joining))
        running.error = f"{names} cannot be added: {reason}" + (
            f"; {', '.join(gone)} is gone already" if gone else ""
        )
        joining, running.joining, running.drain_s = running.joining, set(), 0.0
        running.deadline_at = None
        self._stop(sorted(joining))

    def _is_gone(self, engine: str) -> bool:
        return not self._processes.units_of(engine)

    # Readiness

    def _missing(self, joining: set[str]) -> list[str] | None:
        """Return the pairs that new engines have yet to prove; None: their processes still start.

        Engines that sleep, or start anew, prove theirs when they are back.
        """
        unready = {unit.engine for unit in self._processes.units if not unit.ready}
        if unready & joining:
            return None
        asleep = {member.spec.engine for member in self._processes if member.sleep_state != "awake"}
        there = {unit.engine for unit in self._processes.units} - unready - asleep
        return [
            line for engine in sorted(joining) for line in self._pairs.missing_of(engine, there)
        ]

    def _unready(self, joining: set[str]) -> list[str]:
        return [
            f"{member.name} is {member.state}"
            for unit in self._processes.units
            for member in unit.members
            if unit.engine in joining and not unit.ready
        ]
