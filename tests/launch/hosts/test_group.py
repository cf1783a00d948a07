"""Several hosts are one: what is known of the processes of each."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import zmq

from pdlaunch.launch.hosts.agent_channel import AgentChannel, AgentEvent, HostGroup, Lost, Reported
from pdlaunch.launch.hosts.agent_messages import Exited, Said
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Ready, to_supervisor
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep
from tests.launch.fakes import bootstrap

NAME = "decode-0/rank-0"


class FakeChannel:
    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    def take(self) -> list[AgentEvent]:
        events, self.events = self.events, []
        return events

    def send(self, name: str, message: object) -> None:
        """Nobody is there."""


def test_an_agent_speaks_for_the_processes_of_its_host_alone(tmp_path: Path) -> None:
    channel = FakeChannel()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as control:
        group = HostGroup(
            control,
            tmp_path,
            EnginePorts(),
            name="here",
            channel=cast(AgentChannel, channel),
            on_change=lambda _: None,
        )
        spec = ProcessSpec(name=NAME, kind="rank", unit="ranks", engine="decode-0", host="a")
        group.spawn(spec, 1, bootstrap(NAME))
        step = LastStep(frozenset({7, 5}), frozenset({5}))
        said = Said(name=NAME, frame=to_supervisor.encode(Ready()))
        exited = Exited(name=NAME, incarnation=1, returncode=-11, last_step=step)
        channel.events = [Reported("b", said), Reported("b", exited)]
        channel.events.append(Reported("a", Said(name=NAME, frame=b"\xff")))
        assert (group.exits(), group.messages()) == ([], [])
        channel.events = [Reported("a", said), Reported("a", exited)]
        assert group.exits() == [ProcessExited(NAME, 1, -11, last_step=step)]
        assert group.messages() == [MessageReceived(NAME, Ready())]
        group.spawn(spec, 2, bootstrap(NAME))
        channel.events = [Lost("b", "silent"), Lost("a", "silent")]
        (gone,) = group.exits()
        assert gone.how() == "was lost with its host a (silent)"
