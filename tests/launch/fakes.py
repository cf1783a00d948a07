"""A world without processes: the supervisor's host, observer and clock are in the test's hand."""

import io
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines import NativeEngine
from pdlaunch.launch.events import Event, StopRequested
from pdlaunch.launch.hosts.local import LocalHost, MessageReceived, ProcessExited
from pdlaunch.launch.places import EnginePlaces
from pdlaunch.launch.state import Timing, Unit
from pdlaunch.launch.status import Failure, LaunchPhase, LaunchStatus
from pdlaunch.launch.supervisor import Supervisor
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.control import (
    Address,
    Alive,
    Answered,
    Command,
    Drain,
    Drained,
    Entry,
    Failed,
    FromSupervisor,
    PairReady,
    Ready,
    Register,
    Registry,
    Stop,
    ToSupervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.step_record import LastStep
from pdlaunch.protocol.sockets import LaunchKeys
from tests.clock import FakeClock

M = TypeVar("M")


def make_plan(
    *, num_prefill: int = 1, num_decode: int = 1, num_both: int = 0, tp_size: int = 1
) -> Plan:
    processes = []
    counts = {"prefill": num_prefill, "decode": num_decode, "both": num_both}
    for role, num_engines in counts.items():
        for index in range(num_engines):
            engine = f"{role}-{index}"
            where = {"engine": engine, "role": role, "tp_size": tp_size}
            processes += [
                ProcessSpec(
                    name=f"{engine}/rank-{n}",
                    kind="rank",
                    unit=f"{engine}/ranks",
                    tp_rank=n,
                    **where,
                )
                for n in range(tp_size)
            ]
            processes.append(ProcessSpec(name=engine, kind="server", unit=engine, **where))
    processes.append(ProcessSpec(name="router", kind="router", unit="router"))
    return Plan(processes=tuple(processes))


@dataclass
class FakeHost(LocalHost):
    """Remembers what was asked of it; ``running`` maps names to incarnations."""

    running: dict[str, int] = field(default_factory=dict)
    spawned: list[tuple[str, int]] = field(default_factory=list)
    signals: list[tuple[str, int]] = field(default_factory=list)
    sent: list[tuple[str, FromSupervisor]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # what cannot be started
    sources = ()

    def spawn(
        self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap
    ) -> ProcessExited | None:
        assert spec.name not in self.running
        if spec.name in self.broken:
            return ProcessExited(spec.name, incarnation, 127)
        self.running[spec.name] = incarnation
        self.spawned.append((spec.name, incarnation))
        return None

    def signal(self, name: str, signal_number: int) -> None:
        self.signals.append((name, signal_number))

    def send(self, name: str, message: FromSupervisor) -> None:
        self.sent.append((name, message))

    def forget(self, engine: str) -> None:
        self.forgotten.append(engine)

    def exits(self) -> list[ProcessExited]:
        return []

    def messages(self) -> list[MessageReceived]:
        return []

    def log_path(self, name: str) -> Path:
        return Path(os.devnull)

    def sent_to(self, name: str, kind: type[M]) -> list[M]:
        return [message for to, message in self.sent if to == name and isinstance(message, kind)]

    def receivers(self, kind: type) -> set[str]:
        return {name for name, message in self.sent if isinstance(message, kind)}

    def registry(self, name: str) -> Registry:
        return self.sent_to(name, Registry)[-1]


def bootstrap(name: str, incarnation: int = 1) -> Bootstrap:
    keys = LaunchKeys("", "", "")
    return Bootstrap(
        name=name, incarnation=incarnation, control="", keys=keys, run_dir="", log_level="info"
    )


class FakeBootstraps(Bootstraps):
    def __init__(self) -> None:
        self.gone: list[str] = []
        self.listeners: Any = [io.BytesIO()]  # closed as sockets are

    def make(self, spec: ProcessSpec, incarnation: int, launch: ResolvedLaunch) -> Bootstrap:
        return bootstrap(spec.name, incarnation)

    def forget(self, engine: str) -> None:
        self.gone.append(engine)


SLOW = 0.05


class FakePlaces(EnginePlaces):
    """Hosts on which there is room, or none; their engines cannot change."""

    resolved = None
    kind = NativeEngine()

    def __init__(self) -> None:
        self.has_room = True

    def is_there(self, unit: Unit) -> bool:
        return self.has_room

    def judged(self, pair: PairReady) -> PairReady:
        slow = "PD504 0.05 GB/s" if pair.gigabytes_per_s == SLOW else ""
        return msgspec.structs.replace(pair, slow=slow)


@dataclass
class FakeObserver:
    statuses: list[LaunchStatus] = field(default_factory=list)
    ready_count: int = 0
    notes: list[str] = field(default_factory=list)

    def changed(self, status: LaunchStatus) -> None:
        self.statuses.append(status)

    def ready(self, status: LaunchStatus) -> None:
        self.ready_count += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


class World:
    """Holds a supervisor and all that it sees; methods are what children and users do."""

    def __init__(
        self, plan: Plan, timing: Timing | None = None, places: EnginePlaces | None = None
    ) -> None:
        self.plan = plan
        self.clock = FakeClock()
        self.host = FakeHost()
        self.observer = FakeObserver()
        self.bootstraps = FakeBootstraps()
        self.last_step = LastStep()  # of every rank that ends
        self.room = FakePlaces()
        self.supervisor = Supervisor(
            plan,
            self.host,
            self.bootstraps,
            places or self.room,
            self.observer,
            timing or Timing(),
            self.clock,
        )

    def _handle(self, event: Event) -> None:
        """Have the supervisor act on an event and tell of it, as ``launch.drive`` does."""
        self.supervisor.handle(event)
        if self.supervisor.has_changed:
            self.supervisor.tick()

    @property
    def listens(self) -> bool:
        (listener,) = self.bootstraps.listeners
        return not listener.closed

    @property
    def phase(self) -> LaunchPhase:
        return self.supervisor.seen.phase

    @property
    def failure(self) -> Failure | None:
        return self.supervisor.seen.failure

    @property
    def failed(self) -> Failure:
        assert self.failure is not None
        return self.failure

    @property
    def status(self) -> LaunchStatus:
        return self.supervisor.seen.status()

    def start(self) -> Self:
        self.supervisor.tick()
        return self

    # What children do

    def say(self, name: str, message: ToSupervisor) -> None:
        self._handle(MessageReceived(name, message))

    def register(self, name: str) -> None:
        http = Address(http="http://127.0.0.1:4321")
        self.say(name, Register(name=name, incarnation=self.host.running[name], address=http))

    def become_ready(self, *names: str) -> None:
        for name in names:
            self.register(name)
            self.say(name, Ready())

    def connect(self, local: str, peer: str, speed: float = 3.0) -> None:
        self.say(local, pair_ready(local, peer, self.host.running[peer], speed=speed))

    def all_ready(self) -> Self:
        self.become_ready(*list(self.host.running))
        for decode in self.ranks("decode"):
            for prefill in self.ranks("prefill"):
                self.connect(decode.name, prefill.name)
        return self

    def ranks(self, role: str) -> list[ProcessSpec]:
        return [each for each in self.plan.processes if (each.kind, each.role) == ("rank", role)]

    def drained(self, name: str) -> None:
        self.say(name, Drained())

    def fail(self, name: str, error: str) -> None:
        self.say(name, Failed(error=error))

    def exit(self, name: str, returncode: int = 0, lost_with: str = "") -> None:
        incarnation = self.host.running.pop(name)
        step = self.last_step if "/" in name else LastStep()
        self._handle(ProcessExited(name, incarnation, returncode, lost_with, step))

    def lose(self, *names: str) -> None:
        for name in names:
            self.exit(name, -signal.SIGKILL, "node-1 (silent)")

    def exit_all(self, returncode: int = 0) -> None:
        for name in list(self.host.running):
            self.exit(name, returncode)

    # What users do

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self._handle(StopRequested(number))

    def ask(self, command: Command) -> Answered:
        """Send a command from the router, and return the first answer."""
        num_before = len(self.host.sent_to("router", Answered))
        self.say("router", command)
        answer = self.host.sent_to("router", Answered)[num_before]
        assert answer.question == command.question
        return answer

    # What time does

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.supervisor.tick()

    def pass_time_alive(
        self, seconds: float, *, silent: Collection[str] = (), step_s: float = 1.0
    ) -> None:
        """Let time pass in which every process that runs says that it is alive, but those that are
        ``silent``.
        """
        until = self.clock.now + seconds
        while self.clock.now < until:
            for name in list(self.host.running):
                if name not in silent:
                    self.say(name, Alive())
            self.pass_time(min(step_s, until - self.clock.now))

    # What can be seen

    def entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.host.registry("router").entries}

    def listed(self, name: str) -> str | None:
        """Return the state of a process there; None when it has no line."""
        entry = self.entries().get(name)
        return None if entry is None else entry.state

    def withheld(self) -> set[str]:
        return {entry.name for entry in self.entries().values() if entry.withheld}

    def state(self, name: str) -> str:
        return next(process.state for process in self.status.processes if process.name == name)

    def signalled(self, number: int) -> set[str]:
        return {name for name, sent in self.host.signals if sent == number}

    def stopped(self) -> set[str]:
        return self.host.receivers(Stop)

    def draining(self) -> set[str]:
        return self.host.receivers(Drain)


def serving(timing: Timing | None = None, **shape: int) -> World:
    """A launch that is ready; ``shape``: as in ``make_plan``."""
    return World(make_plan(**shape), timing).start().all_ready()


def pair_ready(
    local: str, peer: str, peer_incarnation: int, num_peers: int = 1, speed: float = 3.0
) -> PairReady:
    return PairReady(
        local=local,
        peer=peer,
        peer_incarnation=peer_incarnation,
        path="fake",
        gigabytes_per_s=speed,
        num_peers=num_peers,
    )
