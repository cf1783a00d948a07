"""Several hosts are one: what is known of the processes of each."""

from __future__ import annotations

from typing import cast

import pytest

from pdlaunch.hosts.agent import AgentSession
from pdlaunch.hosts.agent_channel import AgentChannel, News, Told
from pdlaunch.hosts.agent_messages import Exited, FromAgent, Join, Spawn
from pdlaunch.hosts.group import HostGroup
from pdlaunch.hosts.host import ProcessExited
from pdlaunch.hosts.join import JoinTicket
from pdlaunch.hosts.local import LocalHost
from pdlaunch.process.bootstrap import Bootstrap
from pdlaunch.process.step_record import LastStep
from pdlaunch.protocol.sockets import LaunchKeys
from pdlaunch.resolve.plan import ProcessSpec
from tests.supervisor.fakes import FakeHost

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

    def take(self) -> list[News]:
        news, self.news = self.news, []
        return news

    def send(self, name: str, message: object) -> None:
        pass


class Here(FakeHost):
    """A host that forgets, and whose processes end as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[ProcessExited] = []

    def forget(self, engine: str) -> None:
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


@pytest.mark.parametrize("dies_first", [0, 1])
def test_an_agent_tells_of_the_last_step_whichever_rank_dies_first(
    dies_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = JoinTicket(endpoint="", server_public="", public="", secret="")
    join = Join(name="a", address="127.0.0.1", machine=b"", python="")
    session = AgentSession(ticket, join, {}, [], first_wait_s=1.0, note=print)
    sent: list[FromAgent] = []
    monkeypatch.setattr(session, "_send", sent.append)
    monkeypatch.setattr(session, "_here", lambda bootstrap: bootstrap)
    host = Here()
    for number in (0, 1):
        spawn = Spawn(spec=rank(number, "a"), incarnation=1, bootstrap=BOOTSTRAP)
        session._spawn(spawn, cast(LocalHost, host))
    host.last_steps["decode-0"] = STEP
    host.ended = [ProcessExited(f"decode-0/rank-{dies_first}", 1, -11)]
    session._report(cast(LocalHost, host))
    assert [each.last_step for each in sent if isinstance(each, Exited)] == [STEP]
