"""Holds the desired and the observed state of a launch, and names the actions that follow from it.

Commands change ``Desired``, events change ``Observed``, and ``reconcile`` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from pdlaunch.config.hosts import on_host
from pdlaunch.config.roles import Role
from pdlaunch.launch.bootstraps import HEARTBEATS
from pdlaunch.launch.pairs import Pairs
from pdlaunch.launch.status import Failure, LaunchPhase, LaunchStatus, ProcessState, ProcessStatus
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol import control

# States in which there is an operating system process.
ALIVE = (ProcessState.STARTING, ProcessState.READY, ProcessState.DRAINING)


@dataclass(frozen=True, slots=True)
class Timing:
    """Holds the supervisor's time limits, in seconds."""

    startup_timeout_s: float = 600.0
    drain_s: float = 30.0  # time to finish running requests
    router_stop_s: float = 1.5  # time for the router to end what still runs, before engines go
    stop_s: float = 5.0
    kill_s: float = 5.0
    hang_timeout_s: float = 0.0  # the longest silence of a ready process; 0: no limit
    # Each quick death doubles the wait before the next restart, up to ``max_delay_s``.
    first_delay_s: float = 0.5
    max_delay_s: float = 900.0
    quick_s: float = 60.0  # a death within this time of being ready, or before it, is quick
    max_quick_deaths: int = 5  # in a row; then another engine must do the work

    @property
    def heartbeat_s(self) -> float:
        return self.hang_timeout_s / HEARTBEATS

    def silence_s(self, process: Instance) -> float:
        """Return the longest allowed silence; a sleeping process may be loading its weights."""
        if process.sleep_state == "awake":
            return self.hang_timeout_s
        return max(self.hang_timeout_s, self.startup_timeout_s)

    def delay_s(self, num_quick_deaths: int) -> float:
        """Return the wait before the next start, after quick deaths in a row."""
        # The bound keeps the power from overflowing, however often an engine dies.
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** min(num_quick_deaths - 1, 32)))


@dataclass(slots=True)
class Instance:
    """Holds the state of one planned process."""

    spec: ProcessSpec
    incarnation: int = 0  # counts the starts; 0: never started
    state: ProcessState = ProcessState.PLANNED
    registration: control.Register | None = None
    progress: control.Progress | None = None
    error: str = ""  # the process's last message, else how it died
    sleep_state: Literal["awake", "draining", "sleeping"] = "awake"
    is_drained: bool = False
    heard_at: float = 0.0
    is_stalled: bool = False  # it is ready, but silent for too long to get new work

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        """Return its name for people."""
        return on_host(self.name, self.spec.host)

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def begin(self, incarnation: int) -> None:
        """Reset to the first state of a new incarnation."""
        self.state, self.incarnation = ProcessState.STARTING, incarnation
        self.registration = self.progress = None
        self.error, self.sleep_state = "", "awake"
        self.is_stalled = self.is_drained = False

    def status(self) -> ProcessStatus:
        progress = self.progress if self.state is ProcessState.STARTING else None
        return ProcessStatus(
            name=self.name,
            kind=self.spec.kind,
            host=self.spec.host,
            state=self.state,
            doing=self.error if progress is None else progress.text,
            fraction=None if progress is None else progress.fraction,
        )


@dataclass(slots=True)
class Unit:
    """Processes that start, die and are restarted together: the router, a server, or the ranks of
    one engine, which cannot add up any more once one of them is gone.
    """

    name: str
    processes: list[Instance]
    incarnation: int = 0
    num_quick_deaths: int = 0  # deaths in a row that came before the unit was ready, or soon after
    # The first process to die in this incarnation; the others are killed for it.
    cause: Instance | None = None
    died_at: float = 0.0  # the instant of that death, or the last sign of life of a hung process
    lost_with: str = ""  # the lost host that ended ``cause``; empty: another reason
    ready_at: float | None = None
    kill_at: float | None = None  # its processes should have been ready, or gone, by then
    is_killed: bool = False
    start_at: float | None = None  # the instant at which it is started, if its host is there

    @property
    def alive(self) -> bool:
        return any(process.alive for process in self.processes)

    @property
    def engine(self) -> str:
        """Return the engine's name; empty: there is none."""
        return self.processes[0].spec.engine

    @property
    def ready(self) -> bool:
        return all(process.state is ProcessState.READY for process in self.processes)

    def begin(self, kill_at: float) -> None:
        """Enter the next incarnation, whose processes are about to be spawned."""
        self.incarnation += 1
        self.cause = self.ready_at = self.start_at = None
        self.lost_with, self.is_killed = "", False
        self.kill_at = kill_at
        for process in self.processes:
            process.begin(self.incarnation)


@dataclass(slots=True)
class LaunchedEngine:
    """Holds what is known of one engine."""

    name: str
    role: Role
    units: list[Unit]
    retires: bool = False  # it drains or stops, to be replaced or removed
    stop_at: float | None = None  # its drain ends then, even if requests run; None: no drain
    failed_for: str = ""  # the reason why it was given up; empty once it serves again
    retry_s: float = 0.0  # the wait before it is tried again

    @property
    def processes(self) -> list[Instance]:
        return [process for unit in self.units for process in unit.processes]

    @property
    def server(self) -> Instance:
        return next(process for process in self.processes if process.spec.kind == "server")

    @property
    def ready(self) -> bool:
        return all(unit.ready for unit in self.units)

    @property
    def alive(self) -> bool:
        return any(unit.alive for unit in self.units)

    @property
    def is_given_up(self) -> bool:
        return any(process.state is ProcessState.GIVEN_UP for process in self.processes)

    @property
    def is_awake(self) -> bool:
        return all(process.sleep_state == "awake" for process in self.processes)


@dataclass(slots=True)
class Goal:
    """Holds the desired state of one engine."""

    # Why the engine gets no new work. ``joining``: its pairs are not proven yet; ``leaving``: it
    # will be removed.
    withheld: control.Withheld = ""
    restart: bool = False  # its processes will be replaced
    drain_s: float = 0.0  # time that running requests get before it stops


@dataclass(slots=True)
class EngineChange:
    """A checked change of the engines, and its progress."""

    resolved: ResolvedLaunch  # the launch after the change
    starts: Sequence[PlacedEngine]
    planned: control.PlannedChange  # the change in the form that people see
    warnings: Sequence[str] = ()  # of ``check-config``, which the launch did not have before
    question: int = 0
    asker: str = ""
    deadline_at: float = 0.0  # the instant by which new engines must have joined
    failure: str = ""  # the reason why new engines cannot join

    @property
    def what(self) -> str:
        starts = [f"+{engine.name}" for engine in self.starts]
        return " ".join([*starts, *(f"-{engine}" for engine in self.planned.stops)])


@dataclass(slots=True)
class Desired:
    """Holds the desired state of a launch."""

    timing: Timing
    engines: dict[str, Goal] = field(default_factory=dict)
    change: EngineChange | None = None
    withheld: control.Withheld = "starting"  # why routers refuse requests
    stop_signal: int | None = None  # the signal that asked for the end of the launch
    is_hurried: bool = False  # the user has asked for the end again
    is_strict: bool = False  # pairs that are slow must not be used

    def joins(self, engine: str) -> bool:
        return engine in self.engines and self.engines[engine].withheld == "joining"


@dataclass(slots=True)
class Observed:
    """Holds the observed state of a launch."""

    pairs: Pairs
    started_at: float
    units: list[Unit] = field(default_factory=list)  # router, servers and ranks
    engines: dict[str, LaunchedEngine] = field(default_factory=dict)
    routers: list[Instance] = field(default_factory=list)
    phase: LaunchPhase = LaunchPhase.STARTING
    phase_ends_at: float = 0.0
    failure: Failure | None = None  # the earliest one; later ones count as its consequences
    was_ready: bool = False
    listens: bool = True  # the public sockets are open
    # Digests of the model's files, by name, as the first process of each kind has read them.
    model: dict[str, dict[str, str]] = field(default_factory=dict)
    # How often each process was the first of its unit to end while the launch served.
    ends: dict[str, dict[control.EndReason, int]] = field(default_factory=dict)
    # Incarnations of removed units: a new unit of the same name continues the count.
    last_incarnations: dict[str, int] = field(default_factory=dict)
    _processes: dict[str, tuple[Unit, Instance]] = field(default_factory=dict)

    @property
    def is_ending(self) -> bool:
        return self.phase not in (LaunchPhase.STARTING, LaunchPhase.READY)

    def processes(self) -> Iterator[Instance]:
        return (process for _, process in self._processes.values())

    def find(self, name: str) -> tuple[Unit, Instance] | None:
        return self._processes.get(name)

    def add(self, specs: Sequence[ProcessSpec]) -> None:
        """Add processes that have yet to be started."""
        for unit in make_units(specs):
            unit.incarnation = self.last_incarnations.pop(unit.name, 0)
            self.units.append(unit)
            for process in unit.processes:
                self._processes[process.name] = (unit, process)
                self.ends.setdefault(process.name, {"died": 0, "hung": 0})
            self.routers += [each for each in unit.processes if each.spec.kind == "router"]
            if role := unit.processes[0].spec.role:
                engine = LaunchedEngine(unit.engine, role, [])
                self.engines.setdefault(unit.engine, engine).units.append(unit)

    def remove(self, name: str) -> None:
        """Forget an engine whose processes have ended."""
        for unit in self.engines.pop(name).units:
            self.last_incarnations[unit.name] = unit.incarnation
            self.units.remove(unit)
            for process in unit.processes:
                self.pairs.forget(process.name)
                del self._processes[process.name]

    def plan(self) -> Plan:
        return Plan(processes=tuple(p.spec for unit in self.units for p in unit.processes))

    def find_engine(self, name: str) -> LaunchedEngine | None:
        """Return the engine by its own name or by the name of one of its processes."""
        found = self.find(name)
        return None if found is None else self.engines.get(found[1].spec.engine)

    def serving(self, wanted: Desired) -> list[LaunchedEngine]:
        """Return the engines that get new work."""
        return [
            engine
            for name, engine in self.engines.items()
            if engine.ready
            and not wanted.engines[name].withheld
            and engine.server.sleep_state == "awake"
        ]

    def missing_pairs(self) -> list[str]:
        """Return the unproven pairs of all engines that were not given up, in words."""
        return self.pairs.missing(
            name for name, engine in self.engines.items() if not engine.is_given_up
        )

    def status(self) -> LaunchStatus:
        urls = [p.registration.address.http for p in self.routers if p.registration is not None]
        return LaunchStatus(
            phase=self.phase,
            processes=tuple(process.status() for process in self.processes()),
            pairs=tuple(self.pairs.proven.values()),
            num_missing_pairs=len(self.missing_pairs()),
            url=next(iter(urls), ""),
        )


def make_units(specs: Iterable[ProcessSpec]) -> list[Unit]:
    """Group processes into units, in the order of their first process."""
    units: dict[str, Unit] = {}
    for spec in specs:
        units.setdefault(spec.unit, Unit(spec.unit, [])).processes.append(Instance(spec))
    return list(units.values())


@dataclass(frozen=True, slots=True)
class Start:
    """Start a unit under its next incarnation, if its host is there."""

    unit: str


@dataclass(frozen=True, slots=True)
class SendSignal:
    """Signal a process and all that it has started."""

    process: str
    number: int


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send a message; an answer to a command follows the registry that the command has changed."""

    process: str
    message: control.FromSupervisor


@dataclass(frozen=True, slots=True)
class ForgetEngine:
    """Drop all records of an engine that is gone for good."""

    engine: str


class Chore(Enum):
    """Actions without arguments."""

    ADD_ENGINES = auto()  # take in the processes of the engines that the running change starts
    CLOSE_LISTENERS = auto()  # refuse connections: no router will accept any more


# Happened is told to people, the log and the routers.
Action = Start | SendSignal | SendMessage | control.Happened | ForgetEngine | Chore


@dataclass(slots=True)
class Turn:
    """Holds the state at one instant, and collects the actions that follow from it."""

    wanted: Desired
    seen: Observed
    now: float
    actions: list[Action] = field(default_factory=list)
    next_at: float = math.inf  # the next turn is due then without an event

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def announce(self, text: str) -> None:
        self.do(control.Happened(text=text))

    def due(self, at: float | None) -> bool:
        """Return True if an instant has come; remember it if it is in the future."""
        if at is not None and at > self.now:
            self.next_at = min(self.next_at, at)
        return at is not None and at <= self.now

    @property
    def must_end(self) -> bool:
        seen = self.seen
        return seen.is_ending or seen.failure is not None or self.wanted.stop_signal is not None

    def fail(self, failure: Failure) -> None:
        """Keep the earliest failure, which ends the launch unless it ends already."""
        if self.seen.failure is None and self.wanted.stop_signal is None:
            self.seen.failure = failure
