"""The supervisor starts everything, watches it, restarts what dies, and stops everything.

It acts on events and never waits. ``launch.drive`` is the loop: wait for events, ``handle`` each,
``tick`` for what is due.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.announcements import Announcements
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.deaths import Deaths
from pdlaunch.launch.drains import Drains
from pdlaunch.launch.engine_changes import EngineChanges, EnginePlanner
from pdlaunch.launch.engine_restarts import EngineRestarts
from pdlaunch.launch.engines.kind import EngineKind
from pdlaunch.launch.events import Event, StopRequested
from pdlaunch.launch.failure import Failure, startup_timeout
from pdlaunch.launch.hangs import HangLimits, HangWatch
from pdlaunch.launch.hosts.host import Host, MessageReceived, ProcessExited
from pdlaunch.launch.instance import Instance, Unit
from pdlaunch.launch.notes import Notes
from pdlaunch.launch.processes import LaunchProcesses
from pdlaunch.launch.registry import Pairs
from pdlaunch.launch.restarts import RestartPolicy
from pdlaunch.launch.shutdown import Grace, LaunchShutdown
from pdlaunch.launch.states import LaunchPhase, ProcessState
from pdlaunch.launch.status import LaunchStatus, Observer, ProcessStatus
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.changes import ChangeEngines, EngineIdle, SetDrained
from pdlaunch.protocol.control import (
    Alive,
    Drained,
    Failed,
    PairFailed,
    PairReady,
    PairSuspect,
    Progress,
    Ready,
    Register,
    Restart,
    ServedRequest,
    SleepState,
    ToSupervisor,
)

logger = logging.getLogger(__name__)

SETTLE_S = 0.25e-3
"""Time for each process of the plan between two looks at all of them.

One look costs a few microseconds a process, and the registry that follows about as much: with a
thousand engines a message each would keep the supervisor from its work."""
FAILED_GRACE_S = 5.0
"""Time that a process that has said Failed gets to leave by itself."""


FindRoom = Callable[[Unit, Sequence[Unit]], bool]
"""Tells whether a unit can be started, beside all units of the launch."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Sets every time that the supervisor keeps."""

    startup_timeout_s: float = 600.0
    grace: Grace = field(default_factory=Grace)
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    hangs: HangLimits = field(default_factory=HangLimits)


class Supervisor:
    """Holds the state of one launch and decides what happens to its processes.

    ``failure`` and ``was_ready`` say how the launch went. ``close_listeners`` is called, perhaps
    several times, when no router will accept a connection any more. ``find_room`` is asked before a
    unit that has died is started again. ``planner`` knows what other engines the launch could have;
    None: the engines stay as they are.
    """

    def __init__(
        self,
        plan: Plan,
        kind: EngineKind,
        host: Host,
        bootstraps: Bootstraps,
        observer: Observer,
        timing: Timing,
        clock: Callable[[], float],
        *,
        close_listeners: Callable[[], None],
        find_room: FindRoom = lambda *_: True,
        planner: EnginePlanner | None = None,
    ) -> None:
        self._host = host
        self._bootstraps = bootstraps
        self._close_listeners = close_listeners
        self._observer = observer
        self._timing = timing
        self._clock = clock
        self._processes = LaunchProcesses(
            plan, host, bootstraps, clock, startup_timeout_s=timing.startup_timeout_s
        )
        self._notes = Notes(observer, host, self._processes, clock)
        self._announcements = Announcements(plan, host)
        self._settle_every_s = SETTLE_S * len(plan.processes)
        self._settled_at = -self._settle_every_s
        self._has_news = False
        self._pairs = Pairs(plan, kind)
        self._deaths = Deaths(
            plan,
            host,
            self._processes.units,
            self._pairs,
            timing.restarts,
            clock,
            start=self._processes.spawn,
            fail=self._fail,
            note=self._notes.add,
            find_room=find_room,
        )
        self._restarts = EngineRestarts(
            host,
            timing.grace,
            clock,
            self._processes.units,
            start=self._deaths.start,
            forgive=self._deaths.forgive,
        )
        self._changes = EngineChanges(
            self._processes,
            host,
            self._restarts,
            self._pairs,
            clock,
            planner=planner,
            drain_s=timing.grace.drain_s,
            startup_timeout_s=timing.startup_timeout_s,
            note=self._notes.add,
            answer=self._announcements.answer,
            use_plan=self._use_plan,
            forget=self._deaths.forget,
        )
        self._drains = Drains(self._processes.units, self._notes.add)
        self._hangs = HangWatch(timing.hangs, clock)
        self._phase = LaunchPhase.PREPARING
        self._startup_ends_at = 0.0
        self._shutdown: LaunchShutdown | None = None
        self.failure: Failure | None = None
        self.was_ready = False
        self.stop_signal: int | None = None

    @property
    def phase(self) -> LaunchPhase:
        return self._phase if self._shutdown is None else self._shutdown.phase

    @property
    def done(self) -> bool:
        return self.phase is LaunchPhase.STOPPED

    def survivors(self) -> list[str]:
        """Return the processes that outlived SIGKILL; there are none unless the kernel is stuck."""
        return [instance.name for instance in self._processes if instance.alive]

    def start(self) -> None:
        """Start the conversions, or everything when there are none."""
        self._startup_ends_at = self._clock() + self._timing.startup_timeout_s
        self._processes.spawn_all(self._processes.conversions)
        if not self._processes.conversions:
            self._start_processes()
        self._settle()

    def handle(self, event: Event) -> None:
        """Act on one event; ``tick`` tells others of it."""
        match event:
            case ProcessExited():
                self._on_exit(event)
            case MessageReceived(message=Alive()):
                # Changes nothing that others need to know now, and comes often.
                was_stalled = self._is_stalled(event.name)
                self._on_message(event.name, event.message)
                self._has_news |= was_stalled
                return
            case MessageReceived():
                self._on_message(event.name, event.message)
            case StopRequested():
                self._on_stop(event)
        self._has_news = True

    def tick(self) -> None:
        """Do what is due by the clock, and tell children and views of what has changed."""
        if self._shutdown is None and self._phase is LaunchPhase.READY:
            for instance in self._hangs.look(self._processes):
                self._deaths.hung(self._processes.unit_of(instance), instance)
            self._restarts.tick()
            self._changes.tick()
            self._deaths.tick()
        elif self._shutdown is None and self._clock() >= self._startup_ends_at:
            self._fail(
                startup_timeout(
                    list(self._processes),
                    self._pairs.missing(),
                    self._timing.startup_timeout_s,
                )
            )
        self._settle()

    @property
    def settles_at(self) -> float:
        """Return the instant at which ``tick`` is due for what events have changed."""
        return self._settled_at + self._settle_every_s if self._has_news else math.inf

    def next_tick_at(self) -> float:
        """Return the instant at which ``tick`` is due without an event; a minute from now when
        nothing is.
        """
        if self._shutdown is not None:
            return self._shutdown.ends_at
        if self._phase is not LaunchPhase.READY:
            return self._startup_ends_at
        # Each of these is infinite where nothing is due, which one min() can take.
        return min(
            self._hangs.due_at,
            self._restarts.due_at,
            self._changes.due_at,
            self._deaths.due_at,
            self._clock() + 60.0,
        )

    def status(self) -> LaunchStatus:
        return LaunchStatus(
            phase=self.phase,
            processes=tuple(ProcessStatus.of(instance) for instance in self._processes),
            pairs=tuple(self._pairs.proven()),
            num_missing_pairs=len(self._pairs.missing()),
            url=self._processes.url(),
        )

    # Starting

    def _start_processes(self) -> None:
        self._phase = LaunchPhase.STARTING
        try:
            self._bootstraps.prepare()
        except PdlaunchError as error:
            fix = getattr(error, "fix", None)
            self._fail(Failure(str(error), details=[f"fix: {fix}"] if fix else [], cause=error))
            return
        self._processes.spawn_all(self._processes.units)

    def _use_plan(self) -> None:
        """Take in that engines have come or gone: who proves what, and who is told of whom."""
        plan = self._processes.renew_peers()
        self._announcements.use(plan)
        self._pairs.use(plan)
        self._deaths.use(plan)
        self._settle_every_s = SETTLE_S * len(plan.processes)

    # Messages

    def _on_message(self, name: str, message: ToSupervisor) -> None:
        instance = self._processes.get(name)
        if instance is None:
            logger.warning("message from unknown process %s", name)
            return
        if not isinstance(message, PairReady | PairFailed):
            # Those come from another thread than the loop's.
            self._hangs.heard(instance)
        match message:
            case Register():
                self._on_register(instance, message)
            case Failed():
                self._on_failed(instance, message.error)
            case Progress():
                instance.progress = message
            case Alive():
                pass
            # Messages of a dead incarnation may still be in the queue.
            case _ if instance.registration is None or not instance.alive:
                logger.warning("%s from %s before it registered", type(message).__name__, name)
            case Ready():
                self._on_ready(instance, message)
            case PairReady():
                self._on_pair_ready(instance, message)
            case PairFailed():
                self._on_pair_failed(instance, message)
            case PairSuspect():
                if self._pairs.suspect(message):
                    self._notes.add(
                        f"{message.local} has to prove its path to {message.peer} again: "
                        f"{message.error}"
                    )
            case ServedRequest(line=line):
                self._notes.show(line)
            case SleepState():
                instance.sleep_state = message.state
                self._notes.add(f"{name} is {message.state}")
            case Drained():
                if self._shutdown is not None:
                    self._shutdown.drained(name)
                else:
                    self._restarts.drained(instance)
            case Restart():
                self._announcements.answer(name, self._restarts.ask(message, self.phase))
            case SetDrained():
                self._announcements.answer(name, self._drains.ask(message, self.phase))
            case EngineIdle(engine=engine):
                # An engine that ends with the launch is idle, too, and not started again.
                if self._shutdown is None:
                    self._restarts.idle(engine)
            case ChangeEngines():
                self._changes.ask(message, name, self.phase)

    def _on_register(self, instance: Instance, message: Register) -> None:
        if not instance.may_register(message):
            logger.warning(
                "%s registered as %s, incarnation %d",
                instance.name,
                message.name,
                message.incarnation,
            )
            return
        instance.registration = message
        # It needs the registry now, and not with the next change.
        self._announcements.greet(instance.name)
        if instance.spec.kind == "router":
            self._notes.repeat(instance.name)
            self._restarts.ask_router(instance)

    def _on_ready(self, instance: Instance, message: Ready) -> None:
        instance.info = message.info
        if instance.state is not ProcessState.STARTING:
            return
        instance.move(ProcessState.READY)
        unit = self._processes.unit_of(instance)
        if unit.ready:
            unit.ready_at = self._clock()
            unit.kill_at = None
            if unit.incarnation > 1:
                self._notes.add(f"{unit.name} is ready again (incarnation {unit.incarnation})")
            self._deaths.ready(unit)

    def _on_failed(self, instance: Instance, error: str) -> None:
        instance.error = error
        # Its own words may arrive after its end, which was reported first.
        if self.failure is not None and self.failure.process == instance.name:
            self.failure.said = error
        if self._shutdown is not None or not instance.alive:
            return
        if self._phase is LaunchPhase.READY:
            # It is about to leave by itself, and its end restarts the unit.
            self._processes.unit_of(instance).kill_at = self._clock() + FAILED_GRACE_S
        else:
            self._fail(
                Failure(f"{instance.label} failed to start", process=instance.name, said=error)
            )

    def _on_pair_ready(self, instance: Instance, pair: PairReady) -> None:
        peer = self._processes.get(pair.peer)
        if (
            # A proof of a peer's earlier incarnation is worth nothing.
            peer is not None
            and peer.incarnation == pair.peer_incarnation
            and pair.local == instance.name
        ):
            self._pairs.add(pair)

    def _on_pair_failed(self, instance: Instance, pair: PairFailed) -> None:
        self._pairs.fail(instance.name, pair.peer, pair.error)
        if pair.fatal and self._shutdown is None and self._phase is not LaunchPhase.READY:
            self._fail(
                Failure(
                    f"{instance.label} cannot use {pair.peer}",
                    process=instance.name,
                    said=pair.error,
                )
            )
        else:
            self._notes.add(
                f"{instance.label} cannot reach {pair.peer}: {pair.error}",
                prefill=pair.peer.partition("/")[0],
                decode=instance.spec.engine,
            )
            if self._shutdown is None:
                self._changes.pair_failed(instance, pair)

    # Deaths

    def _on_exit(self, event: ProcessExited) -> None:
        instance = self._processes.get(event.name)
        # An end counts once, and only that of the incarnation that runs.
        if instance is None or event.incarnation != instance.incarnation or not instance.alive:
            return
        unit = self._processes.unit_of(instance)
        # Shutdown, restarts and changes first: they wait for the end, or see to it themselves. Any
        # other is a death, which is counted, and ends a launch that does not serve yet.
        if self._shutdown is not None:
            instance.move(ProcessState.EXITED)
        elif instance.spec.engine in self._restarts:
            self._pairs.forget(instance.name)
            if self._restarts.is_draining(instance.spec.engine):
                # It still computes, and nobody has told it to end.
                self._deaths.tell(unit, instance, event)
            self._restarts.exited(instance)
        elif instance.spec.engine in self._changes:
            instance.move(ProcessState.FAILED)
            self._changes.exited(instance, event)
        elif instance.spec.kind == "convert" and event.returncode == 0:
            self._on_converted(instance)
        elif self._phase is LaunchPhase.READY:
            self._deaths.exited(unit, instance, event)
        else:
            self._on_death_at_start(instance, event)

    def _on_converted(self, instance: Instance) -> None:
        instance.move(ProcessState.EXITED)
        if self._processes.converted:
            self._start_processes()

    def _on_death_at_start(self, instance: Instance, event: ProcessExited) -> None:
        instance.move(ProcessState.FAILED)
        self._pairs.forget(instance.name)
        said, how = instance.error or "", event.how()
        instance.error = said or how
        summary = f"{instance.label} {how} before it was ready"
        self._fail(Failure(summary, process=instance.name, said=said))

    # Ending

    def _fail(self, failure: Failure) -> None:
        """Keep the earliest failure and stop everything."""
        if self._shutdown is None:
            self.failure = failure
            self._begin_shutdown(drain=False)

    def _on_stop(self, event: StopRequested) -> None:
        reason = event.reason or signal.Signals(event.signal_number).name
        if self._shutdown is not None:
            if reason == "SIGTERM":
                return  # Slurm sends it twice at a time limit; who wants to hurry says Ctrl-C.
            self._notes.add(f"{reason}, while stopping: not waiting any longer")
            self._shutdown.hurry()
            return
        self.stop_signal = event.signal_number
        drain_s = self._timing.grace.drain_s
        drain = self._phase is LaunchPhase.READY and drain_s > 0
        wait = f"running requests get up to {drain_s:g} s, a second Ctrl-C skips that"
        self._notes.add(f"{reason}: {wait if drain else 'stopping'}")
        self._begin_shutdown(drain=drain)

    def _begin_shutdown(self, *, drain: bool) -> None:
        self._shutdown = LaunchShutdown(
            self._host,
            list(self._processes),
            self._timing.grace,
            self._clock,
            close_listeners=self._close_listeners,
        )
        self._shutdown.begin(drain=drain)

    # After events

    def _is_stalled(self, name: str) -> bool:
        instance = self._processes.get(name)
        return instance is not None and instance.stalled

    def _settle(self) -> None:
        """Tell children and views what has changed, and notice that the launch is ready or over."""
        self._has_news, self._settled_at = False, self._clock()
        if self._shutdown is not None:
            self._shutdown.advance()
        becomes_ready = (
            self.phase is LaunchPhase.STARTING
            and self._processes.all_ready
            and not self._pairs.missing()
        )
        if becomes_ready:
            self._phase = LaunchPhase.READY
            self.was_ready = True
            logger.info("serving at %s", self.status().url)
        self._announcements.tell(
            self._processes,
            self._pairs.proven(),
            serving=self.was_ready,
            ends=self._deaths.ends,
        )
        self._observer.changed(self.status())
        if becomes_ready:
            self._observer.ready(self.status())
