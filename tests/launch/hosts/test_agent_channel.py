"""Who may join, and what ends a session: over real sockets of this machine, without processes."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import zmq
from msgspec.structs import replace

from pdlaunch.errors import PdlaunchError, ProtocolError, StartupError
from pdlaunch.launch.hosts import agent_channel, agent_messages
from pdlaunch.launch.hosts.agent import AgentSession, SessionLostError
from pdlaunch.launch.hosts.agent_channel import (
    AgentChannel,
    AgentEvent,
    HostGroup,
    Lost,
    Reported,
)
from pdlaunch.launch.hosts.agent_messages import (
    AgentRefused,
    AgentWelcome,
    Beat,
    Join,
    Said,
    Session,
    from_agent,
    to_agent,
)
from pdlaunch.launch.hosts.join import JoinKeys, JoinTicket, new_join_keys
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.network import probe_port
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Failed, Ready, Register, to_supervisor
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.e2e.waiting import await_true
from tests.engine.server.conftest import engine_spec, write_model
from tests.launch.fakes import bootstrap

TIMEOUT_S = 60.0
HELLO = Join(name="a", address="127.0.0.1", machine=Machine())
HELLO_OF_B = replace(HELLO, name="b")
STRANGER_WAIT_S = 0.2  # several times as long as it takes an agent to join


class Clock:
    """Goes on by itself, and further when it is told to."""

    def __init__(self) -> None:
        self._passed_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._passed_s

    def pass_time(self, seconds: float) -> None:
        self._passed_s += seconds


@pytest.fixture
def frequent_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops wait for the next Beat: they see soon what a clock shows, or who is there anew."""
    monkeypatch.setattr(agent_channel, "MAX_BEAT_S", 0.02)


@pytest.fixture
def no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there who would read what an agent says last."""
    monkeypatch.setattr(SecureContext, "LINGER_MS", 0)


@pytest.fixture
def keys() -> JoinKeys:
    return new_join_keys()


@contextlib.contextmanager
def listening(
    keys: JoinKeys, folder: Path, address: str = "127.0.0.1", **options: Any
) -> Iterator[AgentChannel]:
    options = {"timeout_s": TIMEOUT_S, **options}
    channel = AgentChannel(
        keys, address, ["a", "b"], print_to=lambda name: folder / name, **options
    )
    with contextlib.closing(channel):
        yield channel


@pytest.fixture
def channel(keys: JoinKeys, tmp_path: Path) -> Iterator[AgentChannel]:
    with listening(keys, tmp_path) as channel:
        yield channel


def next_event(channel: AgentChannel) -> AgentEvent:
    await_true(lambda: channel._events, "something was told")
    return channel._events.popleft()


def port_of(channel: AgentChannel) -> int:
    return int(channel.endpoint.rpartition(":")[2])


def die(channel: AgentChannel) -> None:
    """End the thread as SIGKILL would: nobody is told, and nobody listens."""
    # A beat that arrives meanwhile is heard, so its agent is not refused either.
    with mock.patch.object(channel, "_send"):
        channel.close()
    # ZMQ closes the socket in a thread of its own.
    await_true(lambda: not probe_port("127.0.0.1", port_of(channel)), "the port is free")


class Agent:
    """An agent in a thread; ``stop`` is what a signal is to a process."""

    def __init__(
        self, ticket: JoinTicket, join: Join = HELLO, wait_s: float = TIMEOUT_S, **options: Any
    ) -> None:
        self._stop, self._stopper = os.pipe()
        self.notes: list[str] = []
        self.outcome: str | PdlaunchError | None = None
        self._session = AgentSession(
            ticket, join, {}, [self._stop], first_wait_s=wait_s, note=self.notes.append, **options
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._session.run()
        except PdlaunchError as error:
            self.outcome = error

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> str | PdlaunchError | None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        os.close(self._stop)
        os.close(self._stopper)
        return self.outcome

    def assert_refused(self, *parts: str) -> None:
        outcome = self.end()
        assert isinstance(outcome, StartupError)
        assert all(part in str(outcome) for part in parts), outcome

    def await_joined(self) -> None:
        await_true(lambda: self.notes, "it has joined")

    def stop(self) -> str | PdlaunchError | None:
        os.write(self._stopper, b"x")
        return self.end()


@pytest.fixture
def joined(channel: AgentChannel, keys: JoinKeys) -> Callable[..., Agent]:
    def join(**options: Any) -> Agent:
        agent = Agent(keys.ticket(channel.endpoint), **options)
        assert isinstance(next_event(channel), Join)
        agent.await_joined()
        return agent

    return join


class RawAgent:
    def __init__(self, channel: AgentChannel, keys: JoinKeys) -> None:
        self._context = SecureContext(keys.agents, peer=keys.server.public)
        self.socket = self._context.connect(zmq.DEALER, channel.endpoint, identity=b"raw")
        self.socket.rcvtimeo = int(TIMEOUT_S * 1000)
        self.session = Session()
        self._channel = channel

    def say(self, message: agent_messages.FromAgent) -> None:
        self.socket.send_multipart(self.session.frames(from_agent.encode(message)))

    def join(self) -> None:
        self.say(HELLO)
        assert isinstance(next_event(self._channel), Join)

    def hear(self, kind: type) -> Any:
        while True:
            message = to_agent.decode(self.socket.recv_multipart()[-1])
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def raw(channel: AgentChannel, keys: JoinKeys) -> Iterator[RawAgent]:
    with contextlib.closing(RawAgent(channel, keys)) as raw:
        yield raw


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_agent_joins_and_leaves_with_the_launch(
    keys: JoinKeys, tmp_path: Path, address: str
) -> None:
    with listening(keys, tmp_path, address) as channel:
        agent = Agent(keys.ticket(channel.endpoint))
        assert next_event(channel) == HELLO
    assert agent.end() == "the launch is over"
    assert agent.notes == ["joined as a"]


def test_an_agent_that_is_told_to_end_says_so(
    channel: AgentChannel, joined: Callable[..., Agent]
) -> None:
    assert joined().stop() == "told to end"
    lost = next_event(channel)
    assert lost == Lost("a", "its agent was told to end")
    assert lost.ended_by is None, "its processes have ended before it says so"


@pytest.mark.parametrize("side", ["of the agent", "of the supervisor"])
def test_without_the_secret_of_either_side_nobody_joins(
    channel: AgentChannel, keys: JoinKeys, side: str, no_linger: None
) -> None:
    """A child of a launch has other keys: who serves engines must not start any."""
    other = new_join_keys()
    mixed = (
        JoinKeys(server=keys.server, agents=other.agents)
        if side == "of the agent"
        else JoinKeys(server=other.server, agents=keys.agents)
    )
    agent = Agent(mixed.ticket(channel.endpoint), wait_s=STRANGER_WAIT_S)
    admitted = Agent(keys.ticket(channel.endpoint), HELLO_OF_B)
    assert next_event(channel) == HELLO_OF_B
    agent.assert_refused("answered within")
    assert channel.take() == []
    admitted.stop()


def test_another_version_is_refused_and_both_are_named(
    raw: RawAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_messages, "VERSION", b"99.9")
    frames = raw.session.frames(from_agent.encode(HELLO))
    monkeypatch.undo()
    raw.socket.send_multipart(frames)
    own = agent_messages.VERSION.decode()
    assert raw.hear(AgentRefused).reason == (
        f"the sender is pdlaunch 99.9, the receiver is {own}: install the same version on both "
        "hosts"
    )


def test_a_host_that_is_not_listed_or_is_there_already_is_refused(
    channel: AgentChannel, keys: JoinKeys, joined: Callable[..., Agent]
) -> None:
    ticket = keys.ticket(channel.endpoint)
    Agent(ticket, replace(HELLO, name="c")).assert_refused("c is not one of the hosts a, b")
    first = joined()
    Agent(ticket).assert_refused(
        "another agent has joined as a, from 127.0.0.1", "if its host has failed, join "
    )
    assert first.stop() == "told to end"


def test_the_successor_of_a_dead_agent_need_not_wait(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent
) -> None:
    raw.join()
    raw.close()
    agent = Agent(keys.ticket(channel.endpoint))
    assert isinstance(next_event(channel), Lost)
    assert isinstance(next_event(channel), Join)
    agent.stop()


def test_a_lost_message_ends_the_session(channel: AgentChannel, raw: RawAgent) -> None:
    raw.join()
    raw.session.frames(b"")  # numbered, and never sent
    raw.say(Beat())
    lost = next_event(channel)
    assert isinstance(lost, Lost)
    assert "message 3 came after 1: some were lost" in lost.reason
    assert lost.ended_by is not None
    assert lost.ended_by > time.monotonic(), "it may not have heard of it yet"
    assert "some were lost" in raw.hear(AgentRefused).reason


@pytest.mark.parametrize("num_before", [0, 5])
def test_a_session_that_the_supervisor_does_not_know_is_over(
    raw: RawAgent, num_before: int
) -> None:
    """As after the restart of a supervisor: agents join it anew."""
    for _ in range(num_before):
        raw.session.frames(b"")
    raw.say(Beat())
    assert raw.hear(AgentRefused)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_agent_ends_when_its_supervisor_is_gone_and_another_program_may_be_in_its_place(
    frequent_beats: None,
    no_linger: None,
    channel: AgentChannel,
    joined: Callable[..., Agent],
    is_replaced: bool,
) -> None:
    """ZMQ gives up a connection whose other end speaks no ZMQ: nothing can be sent any more."""
    clock = Clock()
    agent = joined(clock=clock)
    die(channel)
    if is_replaced:
        with socket.create_server(("127.0.0.1", port_of(channel))) as server:
            server.settimeout(TIMEOUT_S)
            connection, _ = server.accept()
            with connection:
                connection.settimeout(TIMEOUT_S)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(4096):
                        pass
            # Some beats, which nobody takes.
            time.sleep(0.1)
    clock.pass_time(TIMEOUT_S)
    agent.assert_refused("silent for")


def test_an_agent_ends_after_a_suspension_of_its_machine(
    frequent_beats: None, joined: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines may have been started elsewhere, whoever answers it now."""
    read, suspended_s = time.clock_gettime, 0.0

    def clock_gettime(clock: int) -> float:
        return read(clock) + (suspended_s if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", clock_gettime)
    agent = joined()
    suspended_s = TIMEOUT_S
    agent.assert_refused("silent for")


@pytest.mark.parametrize("is_late", [False, True])
def test_an_agent_ends_when_its_own_words_are_not_answered_and_asks_anew_after_a_late_welcome(
    keys: JoinKeys, no_linger: None, is_late: bool
) -> None:
    """The link is cut in one direction: it hears its supervisor, which does not hear it."""
    with contextlib.closing(SecureContext(keys.server, peer=keys.agents.public)) as context:
        router, endpoint = context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        clock = Clock()
        agent = Agent(keys.ticket(endpoint), wait_s=3 * TIMEOUT_S, clock=clock)
        identity, *_ = router.recv_multipart()
        session = Session()

        def say(message: agent_messages.ToAgent) -> None:
            router.send_multipart([identity, *session.frames(to_agent.encode(message))])

        if is_late:
            clock.pass_time(2 * TIMEOUT_S)
        say(AgentWelcome(timeout_s=TIMEOUT_S, beat_s=0.1))
        if is_late:
            assert isinstance(agent.end(), SessionLostError)
            return
        agent.await_joined()
        clock.pass_time(TIMEOUT_S)
        while agent.is_alive():
            say(Beat(stamp=0.0))
            time.sleep(0.01)
        agent.assert_refused("silent for")


def test_a_silent_agent_is_lost(keys: JoinKeys, tmp_path: Path) -> None:
    """It is stopped, or its link is cut: its connection is still there."""
    clock = Clock()
    with (
        listening(keys, tmp_path, clock=clock) as channel,
        contextlib.closing(RawAgent(channel, keys)) as raw,
    ):
        raw.join()
        clock.pass_time(2 * TIMEOUT_S)
        channel.send("b", Beat())  # wakes it; nobody gets this
        lost = next_event(channel)
    assert isinstance(lost, Lost)
    assert "silent" in lost.reason


def test_a_port_that_another_supervisor_has_is_named(
    channel: AgentChannel, keys: JoinKeys, tmp_path: Path
) -> None:
    second = JoinKeys(server=keys.server, agents=keys.agents, port=port_of(channel))
    with (
        pytest.raises(StartupError, match="stop the supervisor that listens there"),
        listening(second, tmp_path),
    ):
        pass


@pytest.mark.parametrize("frames", [[], [b"x"], [agent_messages.VERSION, b"short", b""]])
def test_frames_of_something_else_are_no_message(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        Session().payload(frames)


SERVER = ProcessSpec(
    name="prefill-0",
    kind="server",
    unit="prefill-0",
    engine="prefill-0",
    host="a",
    command=("/of/the/supervisor", "-P", "-m", "pdlaunch.engine.server", "--name", "prefill-0"),
)
"""It needs no torch. With a model it waits for its rank until it is told to stop."""


KEYS = new_launch_keys()


@pytest.fixture
def group(channel: AgentChannel, tmp_path: Path) -> Iterator[HostGroup]:
    """What the supervisor has of host a, beside its own."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as control:
        yield HostGroup(
            control, tmp_path, EnginePorts(), name="local", channel=channel, on_change=[].append
        )


def spawn(group: HostGroup, model: Path, incarnation: int = 1) -> None:
    spec = engine_spec(model).model_dump_json()
    given = replace(bootstrap("prefill-0", incarnation), keys=KEYS, engine_json=spec)
    group.spawn(SERVER, incarnation, given)


def heard(group: HostGroup, kind: type) -> list[Any]:
    """Return all messages and exits up to one of a kind."""
    found: list[Any] = []

    def is_heard() -> bool:
        exits = group.exits()
        # In the order of the supervisor: a process says nothing after its end.
        found.extend([*(each.message for each in group.messages()), *exits])
        return any(isinstance(each, kind) for each in found)

    await_true(is_heard, lambda: str(found))
    return found


@pytest.mark.processes
def test_a_process_says_why_before_it_ends_and_its_log_comes_here(
    joined: Callable[..., Agent], group: HostGroup, tmp_path: Path
) -> None:
    agent = joined()
    spawn(group, tmp_path / "no-model")
    *said, gone = heard(group, ProcessExited)
    assert {Register, Failed} <= set(map(type, said))
    assert gone == ProcessExited("prefill-0", 1, 1)
    assert "no-model" in (tmp_path / "prefill-0").read_text()
    agent.stop()


def test_what_the_host_does_not_permit_fails_with_the_reason(
    joined: Callable[..., Agent], group: HostGroup
) -> None:
    agent = joined()
    command = ("/bin/sh", "-c", "id")
    spec = ProcessSpec(name="decode-0", kind="server", unit="u", host="a", command=command)
    group.spawn(spec, 1, bootstrap("decode-0"))
    said, gone = heard(group, ProcessExited)
    assert "an agent does not start a server with /bin/sh" in said.error
    assert gone == ProcessExited("decode-0", 1, 126)
    agent.stop()


@pytest.mark.processes
def test_signals_reach_processes_and_an_agent_whose_socket_is_removed_has_to_join_again(
    joined: Callable[..., Agent], group: HostGroup, tmp_path: Path
) -> None:
    agent = joined()
    write_model(tmp_path)
    spawn(group, tmp_path)
    heard(group, Register)
    group.signal("prefill-0", signal.SIGKILL)
    assert heard(group, ProcessExited)[-1] == ProcessExited("prefill-0", 1, -signal.SIGKILL)
    spawn(group, tmp_path, 2)
    heard(group, Register)
    opened = psutil.Process().net_connections("unix")
    (control,) = {Path(each.laddr) for each in opened if each.laddr.endswith("/control")}
    control.unlink()
    gone = heard(group, ProcessExited)[-1]
    why = f"{control.parent}, the folder of its agent, was removed"
    assert gone.how() == f"was lost with its host a ({why})"
    assert isinstance(agent.end(), SessionLostError)


def test_an_agent_speaks_for_the_processes_of_its_host_alone(
    channel: AgentChannel, group: HostGroup
) -> None:
    name = "decode-0/rank-0"
    spec = ProcessSpec(name=name, kind="rank", unit="ranks", engine="decode-0", host="a")
    group.spawn(spec, 1, bootstrap(name))
    step = LastStep(frozenset({7, 5}), frozenset({5}))
    said = Said(name=name, frame=to_supervisor.encode(Ready()))
    exited = ProcessExited(name, 1, -11, last_step=step)
    channel._events += [Reported("b", said), Reported("b", exited)]
    channel._events.append(Reported("a", Said(name=name, frame=b"\xff")))
    assert (group.exits(), group.messages()) == ([], [])
    channel._events += [Reported("a", said), Reported("a", exited)]
    assert group.exits() == [ProcessExited(name, 1, -11, last_step=step)]
    assert group.messages() == [MessageReceived(name, Ready())]
    group.spawn(spec, 2, bootstrap(name))
    channel._events += [Lost("b", "silent"), Lost("a", "silent")]
    (gone,) = group.exits()
    assert gone.how() == "was lost with its host a (silent)"
