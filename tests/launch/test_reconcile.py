"""Histories replayed against ``observe`` and ``reconcile`` alone: states in, actions out."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from pdlaunch.launch.actions import Action, Chore, SendMessage, SendSignal, Start
from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.events import Event
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.launch.observe import observe
from pdlaunch.launch.pairs import Pairs
from pdlaunch.launch.reconcile import reconcile
from pdlaunch.launch.state import Desired, Goal, Observed, Timing
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import Drain, Drained, Ready, Register
from tests.launch.fakes import make_plan


@dataclass
class History:
    """A launch of two engines of both roles; a process that is started is ready at once."""

    now: float = 0.0
    done: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = make_plan(num_prefill=0, num_decode=0, num_both=2)
        self.seen = Observed([], Pairs(plan, NativeEngine()), self.now)
        self.seen.add(plan.processes)
        self.wanted = Desired(Timing(), {name: Goal() for name in self.seen.engines})

    def take(self, event: Event) -> None:
        observe(self.wanted, self.seen, event, self.now)

    def settle(self) -> list[Action]:
        """Act until nothing is left to do; return what was done."""
        before = len(self.done)
        while actions := reconcile(self.wanted, self.seen, self.now)[0]:
            self.done += actions
            for action in actions:
                if isinstance(action, Start):
                    self._start(action.unit)
        return self.done[before:]

    def _start(self, name: str) -> None:
        unit = next(unit for unit in self.seen.units if unit.name == name)
        unit.begin(kill_at=self.now + 600)
        for process in unit.processes:
            register = Register(name=process.name, incarnation=unit.incarnation, pid=1)
            self.take(MessageReceived(process.name, register))
            self.take(MessageReceived(process.name, Ready()))


def serving() -> History:
    history = History()
    starts = [Start(unit.name) for unit in history.seen.units]
    assert history.settle() == [Chore.PREPARE, *starts]
    assert history.seen.phase is LaunchPhase.READY
    return history


def test_what_is_as_it_should_be_needs_nothing() -> None:
    history = serving()
    assert reconcile(history.wanted, history.seen, history.now) == ([], float("inf"))


def test_a_dead_unit_is_due_after_its_delay_and_not_before() -> None:
    history = serving()
    history.take(ProcessExited("both-0/rank-0", 1, -signal.SIGSEGV))
    history.settle()
    assert reconcile(history.wanted, history.seen, history.now) == ([], 0.5)
    history.now = 0.5
    assert history.settle() == [Start("both-0/ranks")]


def test_an_engine_that_should_be_replaced_drains_stops_and_starts() -> None:
    history = serving()
    history.wanted.engines["both-0"] = Goal(restart=True, drain_s=30)
    assert history.settle() == [SendMessage("both-0", Drain(timeout_s=30))]
    history.take(MessageReceived("both-0", Drained()))
    assert {a.process for a in history.settle() if isinstance(a, SendMessage)} == {
        "both-0",
        "both-0/rank-0",
    }
    history.now = 5.0
    killed = {a.process for a in history.settle() if isinstance(a, SendSignal)}
    assert killed == {"both-0", "both-0/rank-0"}, "they were given the time to stop"
    for name in killed:
        history.take(ProcessExited(name, 1, -signal.SIGKILL))
    assert history.settle() == [Start("both-0/ranks"), Start("both-0")]
    assert not history.wanted.engines["both-0"].restart


def test_what_several_events_ask_for_is_done_at_once() -> None:
    history = serving()
    for name in ("both-0", "both-1", "router"):
        history.take(ProcessExited(name, 1, 1))
    history.settle()
    history.now = 1.0
    assert set(history.settle()) == {Start("both-0"), Start("both-1"), Start("router")}
