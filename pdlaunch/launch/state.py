"""Holds the desired state of a launch, which commands change, and the observed state, which events
change; ``reconcile`` compares them.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from pdlaunch.config.hosts import on_host
from pdlaunch.config.roles import Role
from pdlaunch.launch.bootstraps import HEARTBEATS
from pdlaunch.launch.engines import EngineKind
from pdlaunch.launch.status import Failure, LaunchPhase, LaunchStatus, ProcessState, ProcessStatus
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol import control
from pdlaunch.protocol.control import PairReady, PairSuspect
from pdlaunch.protocol.engine_link import engine_of_rank

# States in which the process exists.
ALIVE = (ProcessState.STARTING, ProcessState.READY, ProcessState.DRAINING)


@dataclass(frozen=True, slots=True)
class Timing:
    startup_timeout_s: float = 600.0
    drain_s: float = 30.0  # time to finish running requests
    router_stop_s: float = 1.5  # time for the router to end running requests before engines stop
    stop_s: float = 5.0
    kill_s: float = 5.0
    hang_timeout_s: float = 0.0  # the longest silence of a ready process; 0: no limit
    # Each quick death doubles the wait before the next start, up to ``max_delay_s``.
    first_delay_s: float = 0.5
    max_delay_s: float = 900.0
    quick_s: float = 60.0  # a death within this time of being ready, or before it, is quick
    max_quick_deaths: int = 5  # in a row; then another engine must do the work

    @property
    def heartbeat_s(self) -> float:
        return self.hang_timeout_s / HEARTBEATS

    def silence_s(self, process: "Instance") -> float:
        """Return the longest allowed silence; a sleeping process may be loading its weights."""
        if process.sleep_state == "awake":
            return self.hang_timeout_s
        return max(self.hang_timeout_s, self.startup_timeout_s)

    def wait_s(self, num_quick_deaths: int) -> float:
        """Return the wait before a restart, or until an engine that was given up is retried."""
        # This function stays pure: derive any jitter from the unit's name and incarnation.
        # The bound keeps the power from overflowing, however often an engine dies.
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** min(num_quick_deaths - 1, 32)))


@dataclass(slots=True)
class Instance:
    spec: ProcessSpec
    incarnation: int = 0  # counts the starts; 0: never started
    state: ProcessState = ProcessState.PLANNED
    registration: control.Register | None = None
    progress: control.Progress | None = None
    error: str = ""  # the last error that it sent, else how it died
    sleep_state: Literal["awake", "draining", "sleeping"] = "awake"
    is_drained: bool = False
    seen_at: float = 0.0
    is_stalled: bool = False  # ready, but silent for so long that it gets no new work

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        return on_host(self.name, self.spec.host)

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def begin(self, incarnation: int) -> None:
        self.state, self.incarnation = ProcessState.STARTING, incarnation
        self.registration = self.progress = None
        self.error, self.sleep_state = "", "awake"
        self.is_stalled = self.is_drained = False

    def status(self) -> ProcessStatus:
        progress = self.progress if self.state is ProcessState.STARTING else None
        return ProcessStatus(
            name=self.name,
            host=self.spec.host,
            state=self.state,
            doing=self.error if progress is None else progress.text,
            fraction=None if progress is None else progress.fraction,
        )


@dataclass(slots=True)
class Unit:
    """Holds processes that start, die and are restarted together: the router, a server, or the
    ranks of one engine, which cannot compute without each other.
    """

    name: str
    processes: list[Instance]
    incarnation: int = 0
    num_quick_deaths: int = 0  # successive deaths before the unit was ready, or soon after
    # The first process to die in this incarnation; then the others are killed.
    cause: Instance | None = None
    died_at: float = 0.0  # when ``cause`` died, or was last heard if it hung
    is_lost: bool = False  # the host of one of its processes was lost
    ready_at: float | None = None
    kill_at: float | None = None  # kill its processes then if they are not ready, or not gone
    is_killed: bool = False
    start_at: float | None = None  # when to start it, if its host is present

    @property
    def alive(self) -> bool:
        return any(process.alive for process in self.processes)

    @property
    def engine(self) -> str:
        """Return the engine's name; empty for the router."""
        return self.processes[0].spec.engine

    @property
    def ready(self) -> bool:
        return all(process.state is ProcessState.READY for process in self.processes)

    def begin(self, kill_at: float) -> None:
        self.incarnation += 1
        self.cause = self.ready_at = self.start_at = None
        self.is_lost = self.is_killed = False
        self.kill_at = kill_at
        for process in self.processes:
            process.begin(self.incarnation)


@dataclass(slots=True)
class LaunchedEngine:
    name: str
    role: Role
    units: list[Unit]
    retires: bool = False  # it drains or stops, and will be restarted or removed
    stop_at: float | None = None  # when its drain ends, even if requests run; None: no drain
    failed_for: str = ""  # why it was given up, or how its model has changed; empty once it serves
    retry_s: float = 0.0  # the wait before it is started again after it was given up

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
    # Why the engine gets no new work. ``joining``: its pairs are not proven yet; ``leaving``: it
    # will be removed.
    withheld: control.Withheld = ""
    restart: bool = False  # its processes will be replaced
    drain_s: float = 0.0  # time that running requests get before it stops


@dataclass(slots=True)
class EngineChange:
    resolved: ResolvedLaunch  # the launch after the change
    starts: Sequence[PlacedEngine]
    planned: control.PlannedChange  # the change as it is shown to users
    warnings: Sequence[str] = ()  # new warnings of rules
    question: int = 0  # number of the command, for the answer
    asker: str = ""  # the router that sent the command
    deadline_at: float = 0.0  # the instant by which new engines must have joined
    failure: str = ""  # the reason why new engines cannot join

    @property
    def what(self) -> str:
        starts = [f"+{engine.name}" for engine in self.starts]
        return " ".join([*starts, *(f"-{engine}" for engine in self.planned.stops)])


@dataclass(slots=True)
class Desired:
    timing: Timing
    engines: dict[str, Goal] = field(default_factory=dict)
    change: EngineChange | None = None
    withheld: control.Withheld = "starting"  # why routers refuse requests
    stop_signal: int | None = None  # the signal that requested the end of the launch
    is_hurried: bool = False  # a second request to end: skip the current wait
    is_strict: bool = False  # pairs that are slow must not be used

    def joins(self, engine: str) -> bool:
        return engine in self.engines and self.engines[engine].withheld == "joining"


class Pairs:
    """Holds which pairs of ranks are proven, and which proofs are missing.

    With different TP sizes, a decode rank pulls from only some ranks of a prefill engine. Each
    proof states from how many (``num_peers``).
    """

    def __init__(self, plan: Plan, kind: EngineKind) -> None:
        self._kind = kind
        self.proven: dict[tuple[str, str], PairReady] = {}
        self._errors: dict[tuple[str, str], str] = {}
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Compute which pairs must be proven, from the processes of a plan."""
        self._due = [
            (process.name, engine)
            for process in plan.processes
            if self._kind.proves_pairs(process)
            for engine in plan.engines("prefill")
            if process.peers is None or engine in process.peers
        ]

    def add(self, pair: PairReady) -> None:
        self.proven[pair.local, pair.peer] = pair
        self._errors.pop((pair.local, pair.peer), None)

    def fail(self, local: str, peer: str, error: str) -> None:
        self._errors[local, peer] = error

    def suspect(self, pair: PairSuspect) -> bool:
        """Drop a proof; return False if it was already dropped or renewed."""
        proof = self.proven.get((pair.local, pair.peer))
        if proof is None or proof.peer_incarnation != pair.peer_incarnation:
            return False
        del self.proven[pair.local, pair.peer]
        self.fail(pair.local, pair.peer, pair.error)
        return True

    def forget(self, name: str) -> None:
        self.proven = {ends: pair for ends, pair in self.proven.items() if name not in ends}

    def missing(self, among: Iterable[str], of: Collection[str] | None = None) -> list[str]:
        """Return a text for each unproven pair of engines ``among``, one of which is in ``of``."""
        there, texts = set(among), []
        peers: dict[tuple[str, str], list[PairReady]] = defaultdict(list)
        for pair in self.proven.values():
            peers[pair.local, engine_of_rank(pair.peer)].append(pair)
        errors = {(rank, engine_of_rank(peer)): said for (rank, peer), said in self._errors.items()}
        for local, engine in self._due:
            ends, proofs = {engine_of_rank(local), engine}, peers[local, engine]
            # Without a proof, the number of ranks that this one pulls from is not known.
            num_peers = max((pair.num_peers for pair in proofs), default=1)
            if ends <= there and (of is None or ends & {*of}) and len(proofs) < num_peers:
                only = f"a path to only {len(proofs)} of {num_peers} ranks of"
                error = f": {said}" if (said := errors.get((local, engine))) else ""
                texts.append(f"{local} has {only if proofs else 'no path to'} {engine}{error}")
        return texts


@dataclass(slots=True)
class Observed:
    pairs: Pairs
    started_at: float
    units: list[Unit] = field(default_factory=list)  # router, servers and ranks
    engines: dict[str, LaunchedEngine] = field(default_factory=dict)
    routers: list[Instance] = field(default_factory=list)
    phase: LaunchPhase = LaunchPhase.STARTING
    phase_ends_at: float = 0.0
    failure: Failure | None = None  # the first failure; later ones count as its consequences
    was_ready: bool = False
    listens: bool = True  # the public sockets are open
    # Digests of the model's files by name, as the first process of each kind read them.
    model: dict[str, dict[str, str]] = field(default_factory=dict)
    # How often each process was the first of its unit to end while the launch served.
    ends: dict[str, dict[control.EndReason, int]] = field(default_factory=dict)
    # Incarnations of removed units, by name: a new unit of the same name continues the count.
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
        """Add planned processes, which are not started yet, grouped into their units."""
        units: dict[str, Unit] = {}
        for spec in specs:
            units.setdefault(spec.unit, Unit(spec.unit, [])).processes.append(Instance(spec))
        for unit in units.values():
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
        for unit in self.engines.pop(name).units:
            self.last_incarnations[unit.name] = unit.incarnation
            self.units.remove(unit)
            for process in unit.processes:
                self.pairs.forget(process.name)
                del self._processes[process.name]

    def plan(self) -> Plan:
        return Plan(processes=tuple(p.spec for unit in self.units for p in unit.processes))

    def serving(self, wanted: Desired) -> list[LaunchedEngine]:
        return [
            engine
            for name, engine in self.engines.items()
            if engine.ready
            and not wanted.engines[name].withheld
            and engine.server.sleep_state == "awake"
        ]

    def missing_pairs(self) -> list[str]:
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


@dataclass(frozen=True, slots=True)
class Start:
    unit: str


@dataclass(frozen=True, slots=True)
class SendSignal:
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send a message. The answer to a command is sent after the registry that it changed."""

    process: str
    message: control.FromSupervisor


@dataclass(frozen=True, slots=True)
class ForgetEngine:
    engine: str


class Chore(Enum):
    ADD_ENGINES = auto()  # add the processes of the new engines of ``Desired.change``
    CLOSE_LISTENERS = auto()  # close the public sockets: no router will accept connections


# Happened is a text for the user, the log and the routers.
Action = Start | SendSignal | SendMessage | control.Happened | ForgetEngine | Chore


@dataclass(slots=True)
class Turn:
    """Holds the state at one instant, and collects the actions that follow from it."""

    wanted: Desired
    seen: Observed
    now: float
    actions: list[Action] = field(default_factory=list)
    next_at: float = math.inf  # when the next turn is due if no event comes before

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def announce(self, text: str) -> None:
        self.do(control.Happened(text=text))

    def due(self, at: float | None) -> bool:
        """Return True if the instant ``at`` has come; a future one is recorded in ``next_at``."""
        if at is not None and at > self.now:
            self.next_at = min(self.next_at, at)
        return at is not None and at <= self.now

    @property
    def must_end(self) -> bool:
        seen = self.seen
        return seen.is_ending or seen.failure is not None or self.wanted.stop_signal is not None

    def fail(self, failure: Failure) -> None:
        """Record the first failure, which ends the launch, unless the launch is ending anyway."""
        if self.seen.failure is None and self.wanted.stop_signal is None:
            self.seen.failure = failure
