"""Stops engines because somebody asked, and starts them anew or lets them go: they finish what runs
first.

::

    begin ── serves ──▶ draining ── idle, or drain_s is over ──▶ stopping ── all ended ──▶ started,
        └── serves not ─────────────────────────────────────────────▲                       or gone

A draining server is listed as such: routers give it no new work. A prefill engine is idle once
decode engines have read what it has computed. What still runs when it is stopped goes on at another
engine.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pdlaunch.launch.hosts.host import Host
from pdlaunch.launch.instance import Instance, Unit, find_engine, server_of, unknown_engine
from pdlaunch.launch.shutdown import Grace
from pdlaunch.launch.states import LaunchPhase, ProcessState
from pdlaunch.protocol.changes import AwaitIdle
from pdlaunch.protocol.control import Drain, Restart, Restarting, Stop


@dataclass(slots=True)
class _Restart:
    units: Sequence[Unit]
    then: Callable[[], None]
    """Called once all processes have ended."""
    stop_at: float | None = None
    """Instant at which the engine is stopped whatever runs; None: it is being stopped."""
    is_retirement: bool = False
    has_readers: bool = False
    """Its server is done; a router is asked whether somebody has yet to read KV blocks."""


class EngineRestarts:
    """Keeps the restarts that are under way; ``in`` asks for an engine.

    ``units``: all of the launch. ``start`` spawns a unit; ``forgive`` is told of an engine before
    its restart.
    """

    def __init__(
        self,
        host: Host,
        grace: Grace,
        clock: Callable[[], float],
        units: Sequence[Unit],
        *,
        start: Callable[[Unit], None],
        forgive: Callable[[str], None],
    ) -> None:
        self._host = host
        self._grace = grace
        self._clock = clock
        self._units = units
        self._start = start
        self._forgive = forgive
        self._restarts: dict[str, _Restart] = {}

    def __contains__(self, engine: str) -> bool:
        return engine in self._restarts

    def is_draining(self, engine: str) -> bool:
        """Return True while the engine works at what runs and none of its processes was told to
        end.
        """
        restart = self._restarts.get(engine)
        return restart is not None and restart.stop_at is not None

    @property
    def due_at(self) -> float:
        """Return the instant at which ``tick`` has something to do; infinity: none."""
        return min(
            (r.stop_at for r in self._restarts.values() if r.stop_at is not None),
            default=math.inf,
        )

    def ask(self, message: Restart, phase: LaunchPhase) -> Restarting:
        """Begin a restart, unless the launch is in another phase than READY.

        Asking again while a restart is under way changes nothing.
        """
        engine = find_engine(self._units, message.name)
        if not engine:
            return Restarting(
                question=message.question, error=unknown_engine(self._units, message.name)
            )
        if phase is not LaunchPhase.READY:
            return Restarting(
                question=message.question,
                engine=engine,
                error=f"{engine} cannot be restarted: the launch is {phase}",
            )
        if server_of(self._units, engine).withheld == "joining":
            return Restarting(
                question=message.question,
                engine=engine,
                error=f"{engine} cannot be restarted: it is being added",
            )
        units = [unit for unit in self._units if unit.engine == engine]
        incarnation = next(unit.incarnation for unit in units if unit.name == engine)
        if engine not in self._restarts:
            self._forgive(engine)
            self._begin(engine, units, self._grace.drain_s, partial(self._start_all, units))
        elif self._restarts[engine].is_retirement:
            return Restarting(
                question=message.question,
                engine=engine,
                error=f"{engine} cannot be restarted: it is being removed",
            )
        return Restarting(question=message.question, engine=engine, incarnation=incarnation)

    def retire(self, engine: str, drain_s: float, then: Callable[[], None]) -> None:
        """Drain and stop an engine for good; ``then`` is called once all of its processes have
        ended, perhaps at once.
        """
        units = [unit for unit in self._units if unit.engine == engine]
        self._begin(engine, units, drain_s, then, is_retirement=True)

    def _start_all(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self._start(unit)

    def _begin(
        self,
        engine: str,
        units: Sequence[Unit],
        drain_s: float,
        then: Callable[[], None],
        *,
        is_retirement: bool = False,
    ) -> None:
        """Drain or stop the engine; deaths before this do not count any more."""
        restart = self._restarts[engine] = _Restart(units, then, is_retirement=is_retirement)
        serves = all(unit.ready for unit in units)
        for unit in units:
            unit.num_quick_deaths = 0
            unit.respawn_at = unit.kill_at = None
        # An engine that does not serve has nothing to finish.
        if not serves or drain_s <= 0:
            self._stop(engine, restart)
            return
        restart.stop_at = self._clock() + drain_s
        for server in [member for member in _members(units) if member.spec.kind == "server"]:
            server.move(ProcessState.DRAINING)
            self._host.send(server.name, Drain(timeout_s=drain_s))

    def drained(self, instance: Instance) -> None:
        """Stop the engine, whose server has nothing left to do; a prefill engine once routers have
        nobody who is yet to read KV blocks from it.
        """
        engine = instance.spec.engine
        if not self.is_draining(engine):
            return
        restart = self._restarts[engine]
        if instance.spec.role == "prefill":
            restart.has_readers = True
            for unit in self._units:
                for member in unit.members:
                    self.ask_router(member)
        else:
            self._stop(engine, restart)

    def ask_router(self, instance: Instance) -> None:
        """Have a router tell which engines are idle that are waited for; others tell nothing."""
        if instance.spec.kind == "router":
            for engine, restart in self._restarts.items():
                if restart.has_readers and restart.stop_at is not None:
                    self._host.send(instance.name, AwaitIdle(engine=engine))

    def idle(self, engine: str) -> None:
        """Stop an engine of which a router says that nobody has yet to read from it."""
        if self.is_draining(engine) and self._restarts[engine].has_readers:
            self._stop(engine, self._restarts[engine])

    def exited(self, instance: Instance) -> None:
        """Handle the end of a process of an engine that is being restarted, asked for or not."""
        engine = instance.spec.engine
        restart = self._restarts[engine]
        instance.registration = None
        instance.move(ProcessState.EXITED)
        if self.is_draining(engine):
            self._stop(engine, restart)
        else:
            self._start_if_stopped(engine, restart)

    def tick(self) -> None:
        for engine, restart in list(self._restarts.items()):
            if restart.stop_at is not None and self._clock() >= restart.stop_at:
                self._stop(engine, restart)

    def _stop(self, engine: str, restart: _Restart) -> None:
        """Tell ready processes to stop, by message.

        Those that still start may be busy loading, so they get SIGTERM. Stragglers are killed.
        """
        restart.stop_at = None
        for unit in restart.units:
            for member in unit.members:
                if not member.alive:
                    continue
                # Deaths.tick kills what has not left by then.
                unit.kill_at = self._clock() + self._grace.stop_s
                member.registration = None
                if member.state is ProcessState.STARTING:
                    self._host.signal(member.name, signal.SIGTERM)
                else:
                    self._host.send(member.name, Stop())
        self._start_if_stopped(engine, restart)

    def _start_if_stopped(self, engine: str, restart: _Restart) -> None:
        if not any(unit.alive for unit in restart.units):
            del self._restarts[engine]
            restart.then()


def _members(units: Sequence[Unit]) -> list[Instance]:
    return [member for unit in units for member in unit.members]
