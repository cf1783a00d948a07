"""Makes several hosts one ``Host``: this machine, and those whose agents have joined."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.launch.hosts.agent_channel import AgentChannel, AgentEvent, Joined, Lost, Told
from pdlaunch.launch.hosts.agent_messages import Exited, Said, Send, Signal, Spawn
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.launch.hosts.local import LocalHost
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import FromSupervisor, from_supervisor, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts

logger = logging.getLogger(__name__)


class HostGroup(LocalHost):
    """Makes one ``Host`` of all hosts of a launch: a process runs on the host that its spec names.

    ``on_change`` gets the hosts that join or are lost.
    """

    def __init__(
        self,
        control: zmq.Socket[bytes],
        log_dir: Path,
        engine_ports: EnginePorts,
        *,
        name: str,
        channel: AgentChannel,
        on_change: Callable[[Joined | Lost], None],
    ) -> None:
        super().__init__(control, log_dir, engine_ports)
        self._name = name  # of this machine
        self._channel = channel
        self._on_change = on_change
        self._spawned: dict[str, Spawn] = {}  # processes that live elsewhere, by name
        self._exits: list[ProcessExited] = []
        self._messages: list[MessageReceived] = []

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        return (*super().sources, self._channel.fileno())

    def spawn(
        self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap
    ) -> ProcessExited | None:
        if spec.host == self._name:
            return super().spawn(spec, incarnation, bootstrap)
        message = Spawn(spec=spec, incarnation=incarnation, bootstrap=bootstrap)
        self._spawned[spec.name] = message
        self._channel.send(spec.host, message)
        return None

    def signal(self, name: str, signal_number: int) -> None:
        if (spawned := self._spawned.get(name)) is not None:
            self._channel.send(spawned.spec.host, Signal(name=name, number=signal_number))
        else:
            super().signal(name, signal_number)

    def send(self, name: str, message: FromSupervisor) -> None:
        if (spawned := self._spawned.get(name)) is not None:
            frame = from_supervisor.encode(message)
            self._channel.send(spawned.spec.host, Send(name=name, frame=frame))
        else:
            super().send(name, message)

    def exits(self) -> list[ProcessExited]:
        for event in self._channel.take():
            self._take_in(event)
        exits, self._exits = [*self._exits, *super().exits()], []
        return exits

    def messages(self) -> list[MessageReceived]:
        messages, self._messages = self._messages, []
        return [*messages, *super().messages()]

    def _take_in(self, event: AgentEvent) -> None:
        match event:
            case Joined():
                self._on_change(event)
            case Lost(name=host, reason=reason):
                self._on_change(event)
                for name in sorted(self._spawned):
                    if self._spawned[name].spec.host == host:
                        incarnation = self._spawned.pop(name).incarnation
                        exited = ProcessExited(
                            name, incarnation, -signal.SIGKILL, lost_with=f"{host} ({reason})"
                        )
                        self._exits.append(exited)
            case Told(name=host, message=Said() | Exited() as message):
                spawned = self._spawned.get(message.name)
                # An agent speaks for the processes of its host alone.
                if spawned is None or spawned.spec.host != host:
                    logger.warning("%s reported %r, which is not there", host, message.name[:80])
                else:
                    self._heard(host, message)
            case Told():
                pass

    def _heard(self, host: str, message: Said | Exited) -> None:
        name = message.name
        match message:
            case Said(frame=frame):
                try:
                    self._messages.append(MessageReceived(name, to_supervisor.decode(frame)))
                except ProtocolError:
                    logger.warning("malformed message from %r on %s", name, host)
            case Exited(incarnation=incarnation, returncode=returncode, last_step=last_step):
                del self._spawned[name]
                exited = ProcessExited(name, incarnation, returncode, last_step=last_step)
                self._exits.append(exited)
