"""Several hosts are one: what is known of the processes of each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import zmq

from pdlaunch.launch.hosts.agent_channel import AgentChannel, AgentEvent, HostGroup, Lost, Reported
from pdlaunch.launch.hosts.agent_messages import Exited, FromAgent, Said
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Ready, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep
from pdlaunch.protocol.sockets import LaunchKeys

STEP = LastStep(frozenset({7, 5}), frozenset({5}))
NAME = "decode-0/rank-0"


class FakeChannel:
    def __init__(self) -> None:
        self.events: list[AgentEvent] = []
        self.sent: list[tuple[str, object]] = []

    def take(self) -> list[AgentEvent]:
        events, self.events = self.events, []
        return events

    def send(self, name: str, message: object) -> None:
        self.sent.append((name, message))


class Hosts:
    """Hosts ``a`` and ``b``."""

    def __init__(self, control: zmq.Socket[bytes], folder: Path) -> None:
        self.channel = FakeChannel()
        self.events: list[AgentEvent] = []
        self.group = HostGroup(
            control,
            folder,
            EnginePorts(),
            name="here",
            channel=cast(AgentChannel, self.channel),
            on_change=self.events.append,
        )

    def spawn(self, host: str, incarnation: int = 1, name: str = NAME) -> None:
        spec = ProcessSpec(name=name, kind="rank", unit="ranks", engine="decode-0", host=host)
        keys = LaunchKeys("", "", "")
        bootstrap = Bootstrap(
            name=name, incarnation=incarnation, control="", keys=keys, run_dir="", log_level="info"
        )
        self.group.spawn(spec, incarnation, bootstrap)

    def tell(self, host: str, message: FromAgent) -> list[ProcessExited]:
        self.channel.events.append(Reported(host, message))
        return self.group.exits()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as control:
        yield Hosts(control, tmp_path)


def test_the_end_of_a_rank_tells_what_it_computed(hosts: Hosts) -> None:
    hosts.spawn("a")
    exited = Exited(name=NAME, incarnation=1, returncode=-11, last_step=STEP)
    assert hosts.tell("a", exited) == [ProcessExited(NAME, 1, -11, last_step=STEP)]


def test_all_processes_of_a_lost_host_have_ended_and_no_others(hosts: Hosts) -> None:
    hosts.spawn("a")
    hosts.spawn("b", name="decode-0/rank-1")
    lost = Lost("a", "silent")
    hosts.channel.events.append(lost)
    (gone,) = hosts.group.exits()
    assert (gone.name, gone.returncode) == (NAME, -signal.SIGKILL)
    assert gone.how() == "was lost with its host a (silent)"
    assert hosts.events == [lost]


def test_an_agent_speaks_for_the_processes_of_its_host_alone(hosts: Hosts) -> None:
    hosts.spawn("a")
    said = Said(name=NAME, frame=to_supervisor.encode(Ready()))
    assert hosts.tell("b", said) == hosts.tell("b", Exited(name=NAME, incarnation=1, returncode=0))
    assert hosts.group.messages() == []
    hosts.tell("a", Said(name=NAME, frame=b"\xff"))
    hosts.tell("a", said)
    assert hosts.group.messages() == [MessageReceived(NAME, Ready())]
