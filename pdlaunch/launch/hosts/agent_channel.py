"""The supervisor's side of the channel to agents: lets them join, sends beats, detects lost agents.
``HostGroup`` combines this host and the hosts of agents.

A thread owns the socket, so agents get beats even while the supervisor's loop is busy.

::

    Join ──▶ joined ── Beat, Said, .. ──▶ silent for 1.5 x timeout_s, or not connected ──▶ lost
       └──▶ refused

``ended_by`` computes when all processes of a lost agent have ended.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from pdlaunch.errors import ProtocolError, StartupError
from pdlaunch.launch.hosts import agent_messages as messages
from pdlaunch.launch.hosts.join import JoinKeys
from pdlaunch.launch.hosts.local import LocalHost, MessageReceived, ProcessExited
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import FromSupervisor, from_supervisor, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.sockets import SecureContext

logger = logging.getLogger(__name__)

MAX_BEAT_S = 1.0
_SHARE = 1.5


def beat_s(timeout_s: float) -> float:
    """Return the interval of Beats of both sides; agents check their lease at least as often."""
    return min(MAX_BEAT_S, timeout_s / 4)


def boot_clock() -> float:
    """Return the seconds since the machine booted, including the time it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ended_by(seen_at: float, timeout_s: float) -> float:
    """Return the instant by which an agent last heard at ``seen_at`` has ended its processes.

    The lease ends after ``timeout_s``; the agent gets half of it more to notice this and to kill.
    """
    return seen_at + _SHARE * timeout_s


@dataclass(slots=True)
class AgentLease:
    """Tracks how long an agent may still run processes."""

    since_at: float  # when it sent Join, or the last Beat that was answered
    timeout_s: float

    def renew(self, stamp: float) -> None:  # time of a Beat that the supervisor has answered
        self.since_at = max(self.since_at, stamp)

    def silent_s(self, now: float) -> float | None:
        """Return the seconds without an answer if the lease has ended, else None."""
        silent_s = now - self.since_at
        return silent_s if silent_s > self.timeout_s else None


@dataclass(frozen=True, slots=True)
class Lost:
    name: str
    reason: str
    # When the processes of a cut-off agent that still lives have ended, at the latest; None: they
    # have ended already.
    ended_by: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Reported:
    name: str
    message: messages.Said | ProcessExited


AgentEvent = messages.Join | Lost | Reported


@dataclass(slots=True)
class _Agent:
    name: str
    address: str
    identity: bytes
    seen_at: float
    session: messages.Session
    stamp: float = 0.0  # stamp of its last Beat


class AgentChannel:
    """Listens for the agents of the hosts ``names``. Methods may be called from any thread."""

    def __init__(
        self,
        keys: JoinKeys,
        address: str,
        names: Collection[str],
        *,
        timeout_s: float,
        print_to: Callable[[str], Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``print_to``: returns the log file of a process. Raises StartupError."""
        self._names = sorted(names)
        self._timeout_s = timeout_s
        self._beat_s = beat_s(timeout_s)
        self._print_to = print_to
        self._clock = clock
        self._agents: dict[bytes, _Agent] = {}  # by the identity of their sockets
        self._events: deque[AgentEvent] = deque()
        self._outbox: deque[tuple[str, messages.ToAgent]] = deque()
        self._closing = False
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = SecureContext(keys.server, peer=keys.agents.public)
        endpoint = tcp_endpoint(address, keys.port)
        try:
            self._socket, self.endpoint = self._context.listen(zmq.ROUTER, endpoint)
        except zmq.ZMQError as error:
            self._context.close()
            raise StartupError(
                f"agents cannot join at {endpoint}: {error.strerror}; choose another address or "
                "port with --control-address and --control-port, or stop the supervisor that "
                "listens there"
            ) from None
        # Messages to an agent whose connection is gone raise an error instead of being dropped.
        self._socket.router_mandatory = True
        self._thread = threading.Thread(target=self._run, name="agents", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return a file descriptor that is readable while ``take`` has events."""
        return self._readable

    def take(self) -> list[AgentEvent]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._readable)
        return [self._events.popleft() for _ in range(len(self._events))]

    def send(self, name: str, message: messages.ToAgent) -> None:
        """Queue a message for a host; it is dropped if no agent has joined for this host."""
        self._outbox.append((name, message))
        os.eventfd_write(self._wake, 1)

    def admit(self, public: str) -> None:
        self._context.admit(public)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._context.close()
        os.close(self._readable)
        os.close(self._wake)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            # Without beats, agents end their processes: report them as lost.
            logger.exception("the channel to the agents failed")
            for agent in list(self._agents.values()):
                self._lose(agent, f"the channel failed: {error!r}")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        beat_at = self._clock()
        while not self._closing:
            poller.poll(max(1, int((beat_at - self._clock()) * 1000)))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            now = self._clock()
            self._receive(now)
            while self._outbox:
                name, message = self._outbox.popleft()
                if (agent := self._named(name)) is not None:
                    self._send(agent, message)
            if now >= beat_at:
                beat_at = now + self._beat_s
                for agent in list(self._agents.values()):
                    self._send(agent, messages.Beat(stamp=agent.stamp))
                    # After ``_receive``: messages from before a stop of this process are counted.
                    if now > ended_by(agent.seen_at, self._timeout_s):
                        self._lose(agent, f"silent for {now - agent.seen_at:.0f} s")
        for agent in list(self._agents.values()):
            self._send(agent, messages.Leave(reason="the launch is over"))
        self._socket.close()

    def _named(self, name: str) -> _Agent | None:
        return next((agent for agent in self._agents.values() if agent.name == name), None)

    def _lose(self, agent: _Agent, reason: str, *, has_ended: bool = False) -> None:
        """Report an agent as lost. ``has_ended``: it has ended its processes itself."""
        if self._agents.pop(agent.identity, None) is not None:
            until = None if has_ended else ended_by(agent.seen_at, self._timeout_s)
            self._emit(Lost(agent.name, reason, until))

    def _emit(self, event: AgentEvent) -> None:
        self._events.append(event)
        os.eventfd_write(self._readable, 1)

    def _send(self, agent: _Agent, message: messages.ToAgent) -> None:
        try:
            frames = agent.session.frames(messages.to_agent.encode(message))
            self._socket.send_multipart([agent.identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            # If the agent lives, it reconnects, is refused, and joins with a new session.
            self._lose(agent, "its connection is gone")

    def _receive(self, now: float) -> None:
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            agent = self._agents.get(identity)
            session = messages.Session() if agent is None else agent.session
            try:
                message = messages.from_agent.decode(session.payload(frames))
                if agent is None:
                    self._greet(identity, message, session, now)
                else:
                    agent.seen_at = now
                    self._handle(agent, message)
            except ProtocolError as error:
                reason = str(error)
                logger.warning("refused agent %s: %s", agent.name if agent else identity, reason)
                # Use a new session's number: the agent accepts a refusal with any number.
                with contextlib.suppress(zmq.ZMQError):
                    refusal = messages.Session().frames(
                        messages.to_agent.encode(messages.AgentRefused(reason=reason))
                    )
                    self._socket.send_multipart([identity, *refusal])
                if agent is not None:
                    self._lose(agent, reason)

    def _greet(
        self, identity: bytes, message: messages.FromAgent, session: messages.Session, now: float
    ) -> None:
        """Let an agent join. Raises ProtocolError with the reason if it may not."""
        if not isinstance(message, messages.Join):
            raise ProtocolError("the supervisor does not know this session")
        name = message.name
        if name not in self._names:
            listed = ", ".join(self._names)
            raise ProtocolError(
                f"{name} is not one of the hosts {listed}: name one of them with --name"
            )
        if (other := self._named(name)) is not None:
            # If that agent was killed, sending fails and removes it, so its successor may join.
            self._send(other, messages.Beat(stamp=other.stamp))
            if self._named(name) is other:
                wait_s = ended_by(other.seen_at, self._timeout_s) + self._beat_s - now
                raise ProtocolError(
                    f"another agent has joined as {name}, from {other.address}: choose another "
                    f"--name, or, if its host has failed, join again in {wait_s:.0f} s"
                )
        agent = self._agents[identity] = _Agent(name, message.address, identity, now, session)
        self._emit(message)
        self._send(agent, messages.AgentWelcome(timeout_s=self._timeout_s, beat_s=self._beat_s))

    def _handle(self, agent: _Agent, message: messages.FromAgent) -> None:
        match message:
            case messages.Beat(stamp=stamp):
                agent.stamp = stamp
            case messages.Printed(name=name, data=data):
                with (
                    contextlib.suppress(OSError, ValueError),
                    self._print_to(name).open("ab") as log,
                ):
                    log.write(data)
            case messages.Leave(reason=reason):
                self._lose(agent, reason, has_ended=True)
            case messages.Said() | ProcessExited():
                self._emit(Reported(agent.name, message))
            case messages.Join():
                pass


class HostGroup(LocalHost):
    """Combines all hosts of a launch: a process runs on the host that its spec names."""

    def __init__(
        self,
        control: zmq.Socket[bytes],
        log_dir: Path,
        engine_ports: EnginePorts,
        *,
        name: str,  # of this host
        channel: AgentChannel,
        on_change: Callable[[messages.Join | Lost], None],  # called for each such host
    ) -> None:
        super().__init__(control, log_dir, engine_ports)
        self._name = name
        self._channel = channel
        self._on_change = on_change
        self._spawned: dict[str, messages.Spawn] = {}  # running processes of other hosts, by name
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
        message = messages.Spawn(spec=spec, incarnation=incarnation, bootstrap=bootstrap)
        self._spawned[spec.name] = message
        self._channel.send(spec.host, message)
        return None

    def signal(self, name: str, signal_number: int) -> None:
        if (spawned := self._spawned.get(name)) is not None:
            self._channel.send(spawned.spec.host, messages.Signal(name=name, number=signal_number))
        else:
            super().signal(name, signal_number)

    def send(self, name: str, message: FromSupervisor) -> None:
        if (spawned := self._spawned.get(name)) is not None:
            frame = from_supervisor.encode(message)
            self._channel.send(spawned.spec.host, messages.Send(name=name, frame=frame))
        else:
            super().send(name, message)

    def exits(self) -> list[ProcessExited]:
        for event in self._channel.take():
            self._take_in(event)
        exits, self._exits = [*self._exits, *super().exits()], []
        return exits

    def messages(self) -> list[MessageReceived]:
        found, self._messages = self._messages, []
        return [*found, *super().messages()]

    def _take_in(self, event: AgentEvent) -> None:
        match event:
            case messages.Join():
                self._on_change(event)
            case Lost(name=host, reason=reason):
                self._on_change(event)
                lost_with, killed = f"{host} ({reason})", -signal.SIGKILL
                for name in sorted(self._spawned):
                    if self._spawned[name].spec.host == host:
                        number = self._spawned.pop(name).incarnation
                        self._exits.append(ProcessExited(name, number, killed, lost_with))
            case Reported(name=host, message=message):
                name = message.name
                spawned = self._spawned.get(name)
                # An agent may report only the processes of its own host.
                if spawned is None or spawned.spec.host != host:
                    logger.warning("%s reported on %r, which is not there", host, name[:80])
                elif isinstance(message, ProcessExited):
                    del self._spawned[name]
                    self._exits.append(message)
                else:
                    try:
                        received = MessageReceived(name, to_supervisor.decode(message.frame))
                        self._messages.append(received)
                    except ProtocolError:
                        logger.warning("malformed message from %r on %s", name, host)
