"""A world without processes: the supervisor's host, observer and clock are in the test's hand."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.events import Event, StopRequested
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.launch.places import EnginePlaces
from pdlaunch.launch.state import Timing, Unit
from pdlaunch.launch.status import Failure, LaunchPhase, LaunchStatus
from pdlaunch.launch.supervisor import Supervisor
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.protocol.control import (
    Address,
    Alive,
    Drain,
    Drained,
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


def make_plan(
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    num_both: int = 0,
    tp_size: int = 1,
    conversions: int = 0,
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
    converting = [
        ProcessSpec(name=f"convert-{n}", kind="convert", unit=f"convert-{n}")
        for n in range(conversions)
    ]
    return Plan(conversions=tuple(converting), processes=tuple(processes))


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeHost:
    """Remembers what was asked of it; ``running`` maps names to incarnations."""

    running: dict[str, int] = field(default_factory=dict)
    spawned: list[tuple[str, int]] = field(default_factory=list)
    signals: list[tuple[str, int]] = field(default_factory=list)
    sent: list[tuple[str, FromSupervisor]] = field(default_factory=list)
    last_steps: dict[str, LastStep] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    sources = ()
    poll_s = math.inf

    def spawn(self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap | None) -> None:
        assert spec.name not in self.running
        assert (bootstrap is None) == (spec.kind == "convert")
        self.running[spec.name] = incarnation
        self.spawned.append((spec.name, incarnation))

    def signal(self, name: str, signal_number: int) -> None:
        self.signals.append((name, signal_number))

    def last_step(self, engine: str) -> LastStep:
        return self.last_steps.get(engine, LastStep())

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

    def sent_to(self, name: str, kind: type) -> list[FromSupervisor]:
        return [
            message
            for receiver, message in self.sent
            if receiver == name and isinstance(message, kind)
        ]

    def registry(self, name: str) -> Registry:
        """Return the newest registry that a process was sent."""
        newest = self.sent_to(name, Registry)[-1]
        assert isinstance(newest, Registry)
        return newest


NO_KEYS = LaunchKeys("", "", "")


class FakeBootstraps(Bootstraps):
    def __init__(self, keys: LaunchKeys = NO_KEYS, control: str = "", run_dir: str = "") -> None:
        self._common = {"keys": keys, "control": control, "run_dir": run_dir}
        self.prepare_error: PdlaunchError | None = None

    def prepare(self) -> None:
        if self.prepare_error is not None:
            raise self.prepare_error

    def make(self, spec: ProcessSpec, incarnation: int) -> Bootstrap:
        return Bootstrap(name=spec.name, incarnation=incarnation, log_level="info", **self._common)


class FakePlaces(EnginePlaces):
    """Hosts on which there is room, or none; their engines cannot change."""

    def __init__(self) -> None:
        self.has_room = True

    def find(self, unit: Unit, units: Sequence[Unit]) -> bool:
        return self.has_room


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
        self.listens = True
        self.room = FakePlaces()
        self.supervisor = Supervisor(
            plan,
            NativeEngine(),
            self.host,
            self.bootstraps,
            places or self.room,
            self.observer,
            timing or Timing(),
            self.clock,
            close_listeners=self._close_listeners,
        )

    def _handle(self, event: Event) -> None:
        """Have the supervisor act on an event and tell of it, as ``launch.drive`` does."""
        self.supervisor.handle(event)
        if self.supervisor.has_changed:
            self.supervisor.tick()

    @property
    def phase(self) -> LaunchPhase:
        return self.supervisor.seen.phase

    @property
    def failure(self) -> Failure | None:
        return self.supervisor.seen.failure

    def _close_listeners(self) -> None:
        self.listens = False

    def start(self) -> World:
        self.supervisor.tick()
        return self

    def say(self, name: str, message: ToSupervisor) -> None:
        self._handle(MessageReceived(name, message))

    def register(self, name: str, address: Address | None = None) -> None:
        incarnation = self.host.running[name]
        http = address or Address(http="http://127.0.0.1:4321")
        self.say(name, Register(name=name, incarnation=incarnation, pid=1, address=http))

    def become_ready(self, name: str) -> None:
        self.register(name)
        self.say(name, Ready())

    def connect(self, local: str, peer: str) -> None:
        self.say(local, pair_ready(local, peer, self.host.running[peer]))

    def all_ready(self) -> World:
        for name in list(self.host.running):
            self.become_ready(name)
        for decode in self.plan.ranks("decode"):
            for prefill in self.plan.ranks("prefill"):
                self.connect(decode.name, prefill.name)
        return self

    def exit(self, name: str, returncode: int = 0) -> None:
        incarnation = self.host.running.pop(name)
        self._handle(ProcessExited(name, incarnation, returncode))

    def lose(self, name: str) -> None:
        """The host of a process is lost."""
        incarnation = self.host.running.pop(name)
        self._handle(ProcessExited(name, incarnation, -signal.SIGKILL, lost_with="node-1 (silent)"))

    def exit_all(self) -> None:
        for name in list(self.host.running):
            self.exit(name)

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

    def listed(self, name: str) -> str | None:
        """Return the state that the router's newest registry gives a process; None when it is not
        in it.
        """
        return next(
            (entry.state for entry in self.host.registry("router").entries if entry.name == name),
            None,
        )

    def drained(self, name: str) -> None:
        self.say(name, Drained())

    def fail(self, name: str, error: str) -> None:
        self.say(name, Failed(error=error))

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self._handle(StopRequested(number))

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.supervisor.tick()

    def signalled(self, number: int) -> set[str]:
        return {name for name, sent in self.host.signals if sent == number}

    def stopped(self) -> set[str]:
        return {name for name, message in self.host.sent if isinstance(message, Stop)}

    def draining(self) -> set[str]:
        return {name for name, message in self.host.sent if isinstance(message, Drain)}

    def state(self, name: str) -> str:
        return next(p.state for p in self.supervisor.seen.status().processes if p.name == name)


def serving(timing: Timing | None = None, **shape: int) -> World:
    """A launch that is ready; ``shape``: as in ``make_plan``."""
    return World(make_plan(**shape), timing).start().all_ready()


def pair_ready(local: str, peer: str, peer_incarnation: int) -> PairReady:
    return PairReady(
        local=local,
        peer=peer,
        peer_incarnation=peer_incarnation,
        seconds=0.1,
        path="fake",
        gigabytes_per_s=3.0,
    )
