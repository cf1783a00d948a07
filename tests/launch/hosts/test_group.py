"""Several hosts are one: what is known of the processes of each."""

from __future__ import annotations

import math
from typing import cast

import pytest

from pdlaunch.launch.hosts.agent import AgentSession
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Lost, News, Told
from pdlaunch.launch.hosts.agent_messages import (
    AskLastStep,
    Exited,
    FromAgent,
    Join,
    LastStepOf,
    Spawn,
)
from pdlaunch.launch.hosts.group import HostGroup
from pdlaunch.launch.hosts.host import ProcessExited
from pdlaunch.launch.hosts.join import JoinTicket
from pdlaunch.launch.hosts.local import LocalHost
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.step_record import LastStep
from pdlaunch.protocol.sockets import LaunchKeys
from tests.launch.fakes import FakeHost

STEP = LastStep(frozenset({7, 5}), frozenset({5}))
BOOTSTRAP = Bootstrap(
    name="decode-0/rank-0",
    incarnation=1,
    control="",
    keys=LaunchKeys("", "", ""),
    run_dir="",
    log_level="info",
)


def rank(number: int, host: str) -> ProcessSpec:
    command = ("python", "-P", "-m", "pdlaunch.engine")
    name, engine = f"decode-0/rank-{number}", "decode-0"
    return ProcessSpec(
        name=name,
        kind="rank",
        unit=f"{engine}/ranks",
        engine=engine,
        host=host,
        tp_rank=number,
        command=command,
    )


class FakeChannel:
    def __init__(self) -> None:
        self.news: list[News] = []
        self.sent: list[tuple[str, object]] = []

    def take(self) -> list[News]:
        news, self.news = self.news, []
        return news

    def send(self, name: str, message: object) -> None:
        self.sent.append((name, message))


class Here(FakeHost):
    """A host that forgets, and whose processes end as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[ProcessExited] = []

    def forget_last_step(self, engine: str) -> None:
        self.last_steps.pop(engine, None)

    def exits(self) -> list[ProcessExited]:
        ended, self.ended = self.ended, []
        return ended


def test_a_process_did_not_die_of_what_its_predecessor_computed() -> None:
    """It ended while nothing ran: nobody is told of requests of long ago."""
    channel, local = FakeChannel(), Here()
    group = HostGroup(
        cast(LocalHost, local), "here", cast(AgentChannel, channel), ["a"], on_news=print
    )
    group.spawn(rank(0, "a"), 1, BOOTSTRAP)
    name = "decode-0/rank-0"
    channel.news = [Told("a", Exited(name=name, incarnation=1, returncode=-11, last_step=STEP))]
    assert [gone.incarnation for gone in group.exits()] == [1]
    assert group.last_step("decode-0") == STEP
    group.spawn(rank(0, "a"), 2, BOOTSTRAP)
    channel.news = [Told("a", Exited(name=name, incarnation=2, returncode=1))]
    assert [gone.incarnation for gone in group.exits()] == [2]
    assert group.last_step("decode-0") == LastStep()
    local.last_steps["decode-0"] = STEP
    group.spawn(rank(0, "a"), 3, BOOTSTRAP)
    assert group.last_step("decode-0") == LastStep(), "it has moved from here to a"


class Far:
    """An engine of which a host each has a rank, the first one on host a; the clock stands."""

    def __init__(self) -> None:
        self.channel, self.local, self.now = FakeChannel(), Here(), 100.0
        self.group = HostGroup(
            cast(LocalHost, self.local),
            "here",
            cast(AgentChannel, self.channel),
            ["a", "b"],
            on_news=print,
            clock=lambda: self.now,
        )
        self.hosts = ["a", "b", "here"]
        for number, host in enumerate(self.hosts):
            self.group.spawn(rank(number, host), 1, BOOTSTRAP)

    def die(self, number: int, returncode: int = -11, last_step: LastStep | None = None) -> None:
        name, host = f"decode-0/rank-{number}", self.hosts[number]
        if host == "here":
            self.local.ended = [ProcessExited(name, 1, returncode)]
            return
        exited = Exited(name=name, incarnation=1, returncode=returncode)
        if last_step is not None:
            exited.last_step = last_step
        self.channel.news.append(Told(host, exited))

    def ended(self) -> list[int]:
        """The ranks whose ends are told now."""
        return [int(gone.name[-1]) for gone in self.group.exits()]


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_is_known_to_be_dead_once_the_host_of_rank_0_has_told_of_the_last_step(
    number: int,
) -> None:
    far = Far()
    far.die(number)
    assert far.ended() == []
    asked = [each for each in far.channel.sent if isinstance(each[1], AskLastStep)]
    assert asked == [("a", AskLastStep(engine="decode-0"))]
    far.channel.news.append(Told("b", LastStepOf(engine="decode-0", last_step=LastStep())))
    assert far.ended() == [], "host b has no word in it"
    far.channel.news.append(Told("a", LastStepOf(engine="decode-0", last_step=STEP)))
    assert far.ended() == [number]
    assert far.group.last_step("decode-0") == STEP


def test_a_rank_that_dies_of_another_one_is_told_after_it() -> None:
    far = Far()
    far.die(1)
    assert far.ended() == []
    far.die(0, returncode=1, last_step=STEP)
    assert far.ended() == [1, 0]
    assert far.group.last_step("decode-0") == STEP
    far.die(2, returncode=1)
    assert far.ended() == [2], "the step is known"


def test_the_end_of_a_rank_does_not_wait_for_ever() -> None:
    far = Far()
    far.die(1)
    assert far.ended() == []
    far.now += far.group.poll_s
    assert far.ended() == [1]
    assert far.group.poll_s == math.inf


def test_a_lost_host_is_asked_nothing() -> None:
    far = Far()
    far.die(1)
    assert far.ended() == []
    far.channel.news.append(Lost("a", "silent"))
    assert far.ended() == [1, 0]
    far.die(2)
    assert far.ended() == [2]


def test_the_loss_of_another_host_does_not_end_the_wait_for_the_last_step() -> None:
    far = Far()
    far.group.spawn(rank(3, "b"), 1, BOOTSTRAP)
    far.die(1)
    far.channel.news.append(Lost("b", "silent"))
    assert far.ended() == []
    far.channel.news.append(Told("a", LastStepOf(engine="decode-0", last_step=STEP)))
    assert far.ended() == [1, 3], "what follows a death is told behind it"
    assert far.group.last_step("decode-0") == STEP


def test_who_was_killed_has_died_of_no_step() -> None:
    far = Far()
    far.die(1, returncode=-9)
    assert far.ended() == [1]


def session_of(sent: list[FromAgent], monkeypatch: pytest.MonkeyPatch) -> AgentSession:
    """The session of an agent whose words come to ``sent``."""
    ticket = JoinTicket(endpoint="", server_public="", public="", secret="")
    join = Join(name="a", address="127.0.0.1", machine="", python="")
    session = AgentSession(ticket, join, {}, [], first_wait_s=1.0, note=print)
    monkeypatch.setattr(session, "_send", sent.append)
    monkeypatch.setattr(session, "_here", lambda bootstrap: bootstrap)
    return session


def test_an_agent_answers_what_its_engine_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[FromAgent] = []
    host = Here()
    host.last_steps["decode-0"] = STEP
    session = session_of(sent, monkeypatch)
    session._obey(AskLastStep(engine="decode-0"), cast(LocalHost, host))
    assert sent == [LastStepOf(engine="decode-0", last_step=STEP)]


@pytest.mark.parametrize("dies_first", [0, 1])
def test_an_agent_tells_of_the_last_step_whichever_rank_dies_first(
    dies_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[FromAgent] = []
    session = session_of(sent, monkeypatch)
    host = Here()
    for number in (0, 1):
        spawn = Spawn(spec=rank(number, "a"), incarnation=1, bootstrap=BOOTSTRAP)
        session._spawn(spawn, cast(LocalHost, host))
    host.last_steps["decode-0"] = STEP
    host.ended = [ProcessExited(f"decode-0/rank-{dies_first}", 1, -11)]
    session._report(cast(LocalHost, host))
    assert [each.last_step for each in sent if isinstance(each, Exited)] == [STEP]
