"""Several hosts are one: what is known of the processes of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import zmq

from pdlaunch.launch.hosts.agent_channel import AgentChannel, AgentEvent, HostGroup, Reported
from pdlaunch.launch.hosts.agent_messages import Exited, FromAgent, Said
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Ready, to_supervisor
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep
from tests.launch.fakes import bootstrap

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
        self.group = HostGroup(
            control,
            folder,
            EnginePorts(),
            name="here",
            channel=cast(AgentChannel, self.channel),
            on_change=lambda _: None,
        )

    def spawn(self, host: str) -> None:
        spec = ProcessSpec(name=NAME, kind="rank", unit="ranks", engine="decode-0", host=host)
        self.group.spawn(spec, 1, bootstrap(NAME))

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


def test_an_agent_speaks_for_the_processes_of_its_host_alone(hosts: Hosts) -> None:
    hosts.spawn("a")
    said = Said(name=NAME, frame=to_supervisor.encode(Ready()))
    assert hosts.tell("b", said) == hosts.tell("b", Exited(name=NAME, incarnation=1, returncode=0))
    assert hosts.group.messages() == []
    hosts.tell("a", Said(name=NAME, frame=b"\xff"))
    hosts.tell("a", said)
    assert hosts.group.messages() == [MessageReceived(NAME, Ready())]
