"""Joins the hosts of a launch to one ``Host``: this machine, and those whose agents have joined."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Joined, Lost, News, Told
from pdlaunch.launch.hosts.agent_messages import (
    AgentRefused,
    AskLastStep,
    Exited,
    LastStepOf,
    Said,
    Send,
    Signal,
    Spawn,
)
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.launch.hosts.local import LocalHost
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Failed, FromSupervisor, from_supervisor, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.step_record import LastStep

logger = logging.getLogger(__name__)

_CANNOT_START = 126
_LAST_STEP_S = 1.0
"""The end of a rank waits so long for the last step of its engine, which another host knows."""


@dataclass(slots=True)
class _Asked:
    """Holds the ends of ranks that are told once the last step of their engine is known."""

    until: float
    exits: list[ProcessExited] = field(default_factory=list)


class HostGroup:
    """Makes one ``Host`` of all hosts of a launch: a process runs on the host that its spec names.

    ``present``: the hosts whose agents have joined already. ``on_news`` is told of those that join
    or are lost later.
    """

    def __init__(
        self,
        local: LocalHost,
        local_name: str,
        channel: AgentChannel,
        present: Sequence[str],
        *,
        on_news: Callable[[Joined | Lost], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = local
        self._local_name = local_name
        self._channel = channel
        self._present = set(present)
        self._on_news = on_news
        self._hosts: dict[str, str] = {}
        """The host of each process that was started elsewhere and lives."""
        self._living: defaultdict[str, set[str]] = defaultdict(set)
        """These processes, by host."""
        self._incarnations: dict[str, int] = {}
        self._last_steps: dict[str, LastStep] = {}
        self._engines: dict[str, str] = {}
        """The engine of each rank."""
        self._rank_0_hosts: dict[str, str] = {}
        """The host of the rank that writes down what all of them compute, by engine."""
        self._asked: dict[str, _Asked] = {}
        """The engines whose last step was asked for."""
        self._clock = clock
        self._exits: list[ProcessExited] = []
        self._messages: list[MessageReceived] = []

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        return (*self._local.sources, self._channel.fileno())

    @property
    def poll_s(self) -> float:
        if self._exits:
            return 0.0
        due_at = min((asked.until for asked in self._asked.values()), default=math.inf)
        return min(max(0.0, due_at - self._clock()), self._local.poll_s)

    def spawn(self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap | None) -> None:
        if spec.kind == "rank":
            self._engines[spec.name] = spec.engine
            if not spec.tp_rank:
                # What its predecessor computed last, perhaps on another host, is not what it dies
                # of.
                self._last_steps.pop(spec.engine, None)
                self._local.forget_last_step(spec.engine)
                self._rank_0_hosts[spec.engine] = spec.host
        if spec.host == self._local_name:
            self._local.spawn(spec, incarnation, bootstrap)
            return
        if spec.host not in self._present:
            self._exits.append(_lost(spec.name, incarnation, spec.host, "no agent has joined"))
            return
        assert bootstrap is not None, "conversions run beside the supervisor"
        self._hosts[spec.name] = spec.host
        self._living[spec.host].add(spec.name)
        self._incarnations[spec.name] = incarnation
        self._channel.send(
            spec.host, Spawn(spec=spec, incarnation=incarnation, bootstrap=bootstrap)
        )

    def signal(self, name: str, signal_number: int) -> None:
        if (host := self._hosts.get(name)) is not None:
            self._channel.send(host, Signal(name=name, number=signal_number))
        else:
            self._local.signal(name, signal_number)

    def send(self, name: str, message: FromSupervisor) -> None:
        if (host := self._hosts.get(name)) is not None:
            self._channel.send(host, Send(name=name, frame=from_supervisor.encode(message)))
        else:
            self._local.send(name, message)

    def exits(self) -> list[ProcessExited]:
        for news in self._channel.take():
            self._take_in(news)
        for gone in self._local.exits():
            self._end(gone)
        for engine in [e for e, asked in self._asked.items() if self._clock() >= asked.until]:
            self._wait_no_more(engine)
        exits, self._exits = self._exits, []
        for gone in exits:
            self._living[self._hosts.pop(gone.name, "")].discard(gone.name)
        return exits

    def messages(self) -> list[MessageReceived]:
        messages, self._messages = self._messages, []
        return [*messages, *self._local.messages()]

    def log_path(self, name: str) -> Path:
        return self._local.log_path(name)

    def last_step(self, engine: str) -> LastStep:
        return self._last_steps.get(engine) or self._local.last_step(engine)

    def forget(self, engine: str) -> None:
        self._last_steps.pop(engine, None)
        self._local.forget(engine)

    def _take_in(self, news: News) -> None:
        match news:
            case Joined(join=join):
                self._present.add(join.name)
                self._on_news(news)
            case Lost(name=host, reason=reason):
                self._present.discard(host)
                self._on_news(news)
                for name in sorted(self._living[host]):
                    # Behind a death of its engine that waits to be told: that one is the cause.
                    asked = self._asked.get(self._engines.get(name, ""))
                    exits = self._exits if asked is None else asked.exits
                    exits.append(_lost(name, self._incarnations[name], host, reason))
                for engine in [e for e in self._asked if self._rank_0_hosts[e] == host]:
                    self._wait_no_more(engine)
            # An agent speaks for the processes of its host alone.
            case Told(message=Said() | Exited() | AgentRefused() as said) if (
                self._hosts.get(said.name) != news.name
            ):
                logger.warning("%s told of %r, which is not there", news.name, said.name[:80])
            case Told(message=Said(name=name, frame=frame)):
                try:
                    self._messages.append(MessageReceived(name, to_supervisor.decode(frame)))
                except ProtocolError:
                    logger.warning("malformed message from %r on %s", name[:80], news.name)
            case Told(message=Exited() as gone):
                engine = self._engines.get(gone.name, "")
                if self._rank_0_hosts.get(engine) == news.name:
                    self._take_last_step(engine, gone.last_step)
                self._end(ProcessExited(gone.name, gone.incarnation, gone.returncode))
            case Told(name=host, message=LastStepOf(engine=engine, last_step=last_step)):
                if engine in self._asked and self._rank_0_hosts[engine] == host:
                    self._take_last_step(engine, last_step)
            case Told(message=AgentRefused() as refused):
                error = f"{news.name} does not start it: {refused.reason}"
                self._messages.append(MessageReceived(refused.name, Failed(error=error)))
                self._exits.append(ProcessExited(refused.name, refused.incarnation, _CANNOT_START))
            case _:
                pass

    def _end(self, gone: ProcessExited) -> None:
        """Tell of an end; that of a rank which may have died of its last step is told together with
        that step, so that it comes before what follows the death.
        """
        self._living[self._hosts.get(gone.name, "")].discard(gone.name)
        engine = self._engines.get(gone.name, "")
        there = self._rank_0_hosts.get(engine, "")
        here = {self._local_name, self._hosts.get(gone.name, self._local_name)}
        knows = engine in self._last_steps or there in here or there not in self._present
        if knows or not gone.by_itself:
            self._exits.append(gone)
            return
        if engine not in self._asked:
            self._asked[engine] = _Asked(self._clock() + _LAST_STEP_S)
            self._channel.send(there, AskLastStep(engine=engine))
        self._asked[engine].exits.append(gone)

    def _take_last_step(self, engine: str, last_step: LastStep) -> None:
        self._last_steps[engine] = last_step
        self._wait_no_more(engine)

    def _wait_no_more(self, engine: str) -> None:
        """Tell of the ends that have waited for the last step of the engine."""
        if (asked := self._asked.pop(engine, None)) is not None:
            self._exits += asked.exits


def _lost(name: str, incarnation: int, host: str, reason: str) -> ProcessExited:
    return ProcessExited(name, incarnation, -signal.SIGKILL, lost_with=f"{host} ({reason})")
