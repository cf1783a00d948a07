"""Holds what runs of a plan: instances of process specs, and the units in which they live and die
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdlaunch.config.hosts import on_host
from pdlaunch.launch.states import ALIVE, TRANSITIONS, ProcessState
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.changes import Withheld, why_withheld
from pdlaunch.protocol.control import Entry, ListedState, Progress, Register


@dataclass(slots=True)
class Instance:
    """Holds the state of one process of the plan; ``state`` changes by ``move`` alone."""

    spec: ProcessSpec
    incarnation: int = 0
    """Counts the starts; 0: never started."""
    state: ProcessState = ProcessState.PLANNED
    registration: Register | None = None
    progress: Progress | None = None
    info: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """Words of the process before it died, else how it died."""
    sleep_state: Literal["awake", "draining", "sleeping"] = "awake"
    """The last state that a ready process told of itself."""
    given_up_for: str = ""
    """The reason why its engine was last given up, and the time of the next try."""
    heard_at: float = 0.0
    """Instant at which its loop last turned, as far as is known."""
    stalled: bool = False
    """True for a ready process that has been silent for so long that it gets no new work."""
    withheld: Withheld = ""
    """The reason why a server's engine is given no new work; it holds over restarts."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        """Return its name for people, with the host where that is another one."""
        return on_host(self.name, self.spec.host)

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def move(self, state: ProcessState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.name}: {self.state} -> {state}"
        self.state = state

    def begin(self, incarnation: int) -> None:
        """Enter the first state of a new incarnation; nothing of the one before is kept."""
        self.move(ProcessState.CONVERTING if self.spec.kind == "convert" else ProcessState.STARTING)
        self.incarnation = incarnation
        self.registration = self.progress = self.error = None
        self.sleep_state = "awake"
        self.stalled = False
        self.info = {}

    def may_register(self, message: Register) -> bool:
        """Return whether the process that runs now has sent the message.

        A predecessor's message may arrive after its successor was started.
        """
        return self.alive and (message.name, message.incarnation) == (self.name, self.incarnation)

    def entry(self) -> Entry | None:
        """Return the line of the registry; None while the process is not reachable.

        The server of an engine that was given up keeps its line.
        """
        said = (
            Register(name=self.name, incarnation=self.incarnation, pid=0)
            if self._is_given_up_server()
            else self.registration
        )
        if said is None or self.spec.kind == "convert" or self.state not in _LISTED:
            return None
        return Entry(
            name=self.name,
            kind=self.spec.kind,
            host=self.spec.host,
            incarnation=self.incarnation,
            engine=self.spec.engine,
            role=self.spec.role,
            tp_rank=self.spec.tp_rank,
            tp_size=self.spec.tp_size,
            engine_id=said.engine_id,
            address=said.address,
            capabilities=said.capabilities,
            state=self._listed_state(),
            reason=self.given_up_for
            if self._is_given_up_server()
            else why_withheld(self.withheld, self.spec.engine),
            peers=self.spec.peers if self.spec.kind == "server" else None,
            withheld=self.withheld,
        )

    def _listed_state(self) -> ListedState:
        if self.state is ProcessState.READY and self.stalled:
            return "stalled"
        if self.state is ProcessState.READY and self.sleep_state != "awake":
            return self.sleep_state
        return _LISTED[self.state]

    def _is_given_up_server(self) -> bool:
        return self.state is ProcessState.GIVEN_UP and self.spec.kind == "server"


# A process in any other state has no line in the registry: so everybody hears of a death by the
# line that is gone.
_LISTED: Mapping[ProcessState, ListedState] = {
    ProcessState.STARTING: "starting",
    ProcessState.READY: "ready",
    ProcessState.DRAINING: "draining",
    ProcessState.GIVEN_UP: "failed",
}


@dataclass(slots=True)
class Unit:
    """Processes that start, die and are restarted together: the router, a server, or the ranks of
    one engine, which cannot add up any more once one of them is gone.
    """

    name: str
    members: list[Instance]
    incarnation: int = 0
    num_quick_deaths: int = 0
    """Deaths in a row that came before the unit was ready, or soon after."""
    cause: Instance | None = None
    """The first member to die in this incarnation; the others are killed for it."""
    ready_at: float | None = None
    kill_at: float | None = None
    """Instant at which members that live are killed: they should have been ready, or gone, by then.
    """
    respawn_at: float | None = None
    lost_with: str = ""
    """The host that is lost, of which ``cause`` died; empty: of something else."""

    @property
    def alive(self) -> bool:
        return any(member.alive for member in self.members)

    @property
    def engine(self) -> str:
        """Return the engine's name; empty for the router and conversions."""
        return self.members[0].spec.engine

    @property
    def ready(self) -> bool:
        return all(member.state is ProcessState.READY for member in self.members)


def find_engine(units: Sequence[Unit], name: str) -> str:
    """Return the engine of that name, or that one of its processes has; empty: there is none."""
    named = (unit for unit in units for member in unit.members if member.name == name)
    return next((unit.engine for unit in named), "")


def unknown_engine(units: Sequence[Unit], name: str) -> str:
    """Say that there is no such engine, and which ones there are."""
    known = ", ".join(dict.fromkeys(unit.engine for unit in units if unit.engine))
    return f"there is no engine {name[:100]}; there are: {known}"


def make_units(specs: Sequence[ProcessSpec]) -> list[Unit]:
    """Group processes into units, in the order of their first process."""
    members: dict[str, list[Instance]] = {}
    for spec in specs:
        members.setdefault(spec.unit, []).append(Instance(spec))
    return [Unit(name, instances) for name, instances in members.items()]


def server_of(units: Sequence[Unit], engine: str) -> Instance:
    """Return the server of an engine, which stands for it in the registry."""
    return next(
        member
        for unit in units
        for member in unit.members
        if member.spec.engine == engine and member.spec.kind == "server"
    )


def serving(units: Sequence[Unit]) -> list[Instance]:
    """Return the servers of engines that are given work: all processes of theirs are ready."""
    unready = {unit.engine for unit in units if not unit.ready}
    return [
        member
        for unit in units
        for member in unit.members
        if member.spec.kind == "server"
        and member.spec.engine not in unready
        and not member.withheld
        and member.sleep_state == "awake"
    ]
