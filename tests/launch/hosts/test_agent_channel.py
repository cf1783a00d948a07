"""Who may join, and what ends a session: over real sockets of this machine, without processes."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from pdlaunch.errors import PdlaunchError, ProtocolError, StartupError
from pdlaunch.launch.hosts import agent_channel, agent_messages
from pdlaunch.launch.hosts.agent import (
    AgentRefusedError,
    AgentSession,
    AgentTimeoutError,
    SessionLostError,
)
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Joined, Lost, News, Told
from pdlaunch.launch.hosts.agent_messages import (
    AgentWelcome,
    Beat,
    Join,
    Look,
    Printed,
    Seen,
    Session,
    from_agent,
    to_agent,
)
from pdlaunch.launch.hosts.join import JoinKeys, JoinTicket, new_join_keys
from pdlaunch.machine.availability import probe_port
from pdlaunch.machine.facts import PortState
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext
from tests.e2e.waiting import await_true

TIMEOUT_S = 60.0
HELLO = Join(name="a", address="127.0.0.1", machine="{}", python="python")
HELLO_OF_B = Join(name="b", address="127.0.0.1", machine="{}", python="python")
STRANGER_WAIT_S = 0.2
"""Several times as long as it takes an agent to join."""


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
    channel = AgentChannel(
        keys,
        address,
        ["a", "b"],
        print_to=lambda name: folder / name,
        **{"timeout_s": 60.0, **options},
    )
    with contextlib.closing(channel):
        yield channel


@pytest.fixture
def channel(keys: JoinKeys, tmp_path: Path) -> Iterator[AgentChannel]:
    with listening(keys, tmp_path) as channel:
        yield channel


def news_of(channel: AgentChannel) -> News:
    """The next thing that is told."""
    readable, _, _ = select.select([channel.fileno()], [], [], TIMEOUT_S)
    assert readable, "nothing was told"
    first, *rest = channel.take()
    channel.put_back(rest)
    return first


class Agent:
    """An agent in a thread; ``stop`` is what a signal is to a process."""

    def __init__(
        self,
        ticket: JoinTicket,
        join: Join = HELLO,
        wait_s: float = TIMEOUT_S,
        **options: Any,
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
        """How it ended."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        os.close(self._stop)
        os.close(self._stopper)
        return self.outcome

    def await_joined(self) -> None:
        """Until it has heard that it has joined; the channel tells of it before."""
        await_true(lambda: self.notes, "it has joined")

    def stop(self) -> str | PdlaunchError | None:
        os.write(self._stopper, b"x")
        return self.end()


class RawAgent:
    """Says what a test wants on the channel."""

    def __init__(self, channel: AgentChannel, keys: JoinKeys) -> None:
        self._context = SecureContext(keys.agents, peer=keys.server.public)
        self._socket = self._context.connect(zmq.DEALER, channel.endpoint, identity=b"raw")
        self._socket.rcvtimeo = int(TIMEOUT_S * 1000)
        self.session, self._theirs = Session(), Session()

    def say(self, message: agent_messages.FromAgent) -> None:
        self._socket.send_multipart(self.session.frames(from_agent.encode(message)))

    def hear(self, kind: type) -> Any:
        while True:
            message = to_agent.decode(self._socket.recv_multipart()[-1])
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def raw(channel: AgentChannel, keys: JoinKeys) -> Iterator[RawAgent]:
    with contextlib.closing(RawAgent(channel, keys)) as raw:
        yield raw


def test_an_agent_joins_and_answers_and_leaves_with_the_launch(
    keys: JoinKeys, tmp_path: Path
) -> None:
    with listening(keys, tmp_path) as channel:
        agent = Agent(keys.ticket(channel.endpoint))
        assert news_of(channel) == Joined(HELLO)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            paths = [str(tmp_path), "/no/such/folder"]
            channel.send("a", Look(paths=paths, address="127.0.0.1", ports=[port, 0]))
            told = news_of(channel)
        assert isinstance(told, Told)
        assert isinstance(told.message, Seen)
        assert told.message.missing_paths == ["/no/such/folder"]
        assert list(told.message.busy_ports) == [port]
    assert agent.end() == "the launch is over"
    assert agent.notes == ["joined as a"]


def test_agents_join_over_ipv6_too(keys: JoinKeys, tmp_path: Path) -> None:
    with listening(keys, tmp_path, "::1") as channel:
        assert channel.endpoint.startswith("tcp://[::1]:")
        agent = Agent(keys.ticket(channel.endpoint))
        assert news_of(channel) == Joined(HELLO)
    agent.end()


def test_an_agent_that_is_told_to_end_says_so(channel: AgentChannel, keys: JoinKeys) -> None:
    agent = Agent(keys.ticket(channel.endpoint))
    assert isinstance(news_of(channel), Joined)
    assert agent.stop() == "told to end"
    lost = news_of(channel)
    assert lost == Lost("a", "its agent was told to end")
    assert lost.ended_by is None, "its processes have ended before it says so"


@pytest.mark.parametrize("side", ["of the agent", "of the supervisor"])
def test_without_the_secret_of_either_side_nobody_joins(
    channel: AgentChannel, keys: JoinKeys, side: str, no_linger: None
) -> None:
    other = new_join_keys()
    mixed = (
        JoinKeys(server=keys.server, agents=other.agents)
        if side == "of the agent"
        else JoinKeys(server=other.server, agents=keys.agents)
    )
    agent = Agent(mixed.ticket(channel.endpoint), wait_s=STRANGER_WAIT_S)
    admitted = Agent(keys.ticket(channel.endpoint), HELLO_OF_B)
    assert news_of(channel) == Joined(HELLO_OF_B)
    outcome = agent.end()
    assert isinstance(outcome, AgentTimeoutError)
    assert "answered within" in str(outcome)
    assert channel.take() == []
    admitted.stop()


def test_keys_of_a_launch_open_no_way_to_the_agents_channel(
    channel: AgentChannel, keys: JoinKeys, no_linger: None
) -> None:
    """A child of a launch has these; who serves engines must not start any."""
    public, secret = zmq.curve_keypair()
    ticket = keys.ticket(channel.endpoint)
    launch = LaunchKeys(public.decode(), secret.decode(), "")
    stranger = JoinTicket(
        endpoint=ticket.endpoint,
        server_public=ticket.server_public,
        public=launch.public,
        secret=launch.secret,
    )
    assert isinstance(Agent(stranger, wait_s=STRANGER_WAIT_S).end(), AgentTimeoutError)
    assert channel.take() == []


def test_another_version_is_refused_and_both_are_named(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_messages, "VERSION", b"99.9")
    frames = raw.session.frames(from_agent.encode(HELLO))
    monkeypatch.undo()
    raw._socket.send_multipart(frames)
    reason = raw.hear(agent_messages.AgentRefused).reason
    assert (
        f"the agent is pdlaunch 99.9, the supervisor is {agent_messages.VERSION.decode()}" in reason
    )
    assert "install the same version" in reason


def test_a_host_that_is_not_listed_is_refused(channel: AgentChannel, keys: JoinKeys) -> None:
    join = Join(name="c", address="127.0.0.1", machine="{}", python="python")
    outcome = Agent(keys.ticket(channel.endpoint), join).end()
    assert isinstance(outcome, AgentRefusedError)
    assert "c is none of the hosts a, b" in str(outcome)


def test_one_agent_serves_a_host(channel: AgentChannel, keys: JoinKeys) -> None:
    first = Agent(keys.ticket(channel.endpoint))
    assert isinstance(news_of(channel), Joined)
    second = Agent(keys.ticket(channel.endpoint)).end()
    assert isinstance(second, AgentRefusedError)
    assert "another agent has joined as a" in str(second)
    assert first.stop() == "told to end"


def test_the_successor_of_a_dead_agent_need_not_wait(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent
) -> None:
    raw.say(HELLO)
    assert isinstance(news_of(channel), Joined)
    raw.close()
    agent = Agent(keys.ticket(channel.endpoint))
    assert isinstance(news_of(channel), Lost)
    assert isinstance(news_of(channel), Joined)
    agent.stop()


def test_a_lost_message_ends_the_session(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent
) -> None:
    raw.say(HELLO)
    assert isinstance(news_of(channel), Joined)
    raw.session.frames(b"")  # numbered, and never sent
    raw.say(Beat())
    lost = news_of(channel)
    assert isinstance(lost, Lost)
    assert "some were lost" in lost.reason
    assert lost.ended_by is not None
    assert lost.ended_by > time.monotonic(), "it may not have heard of it yet"
    assert "some were lost" in raw.hear(agent_messages.AgentRefused).reason


def test_a_session_that_the_supervisor_does_not_know_is_over(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent
) -> None:
    """As after the restart of a supervisor: agents join it anew."""
    raw.say(Beat())
    assert "does not know this session" in raw.hear(agent_messages.AgentRefused).reason


def test_a_resumed_supervisor_finds_its_agents_again(
    keys: JoinKeys, tmp_path: Path, frequent_beats: None
) -> None:
    with listening(keys, tmp_path) as dead:
        agent = Agent(keys.ticket(dead.endpoint))
        assert isinstance(news_of(dead), Joined)
        agent.await_joined()
        die(dead)
        port = int(dead.endpoint.rpartition(":")[2])
        resumed = JoinKeys(server=keys.server, agents=keys.agents, port=port)
        with listening(resumed, tmp_path) as channel:
            assert isinstance(agent.end(), SessionLostError)
            again = Agent(keys.ticket(channel.endpoint))
            assert isinstance(news_of(channel), Joined)
            again.stop()


def test_an_agent_ends_when_its_supervisor_is_silent(
    frequent_beats: None, no_linger: None, channel: AgentChannel, keys: JoinKeys
) -> None:
    clock = Clock()
    agent = Agent(keys.ticket(channel.endpoint), clock=clock)
    assert isinstance(news_of(channel), Joined)
    agent.await_joined()
    die(channel)
    clock.pass_time(TIMEOUT_S)
    outcome = agent.end()
    assert isinstance(outcome, AgentTimeoutError)
    assert "silent for" in str(outcome)


def test_an_agent_ends_when_another_program_listens_in_its_supervisors_place(
    frequent_beats: None, no_linger: None, channel: AgentChannel, keys: JoinKeys
) -> None:
    """ZMQ gives up a connection whose other end speaks no ZMQ: nothing can be sent any more."""
    clock = Clock()
    agent = Agent(keys.ticket(channel.endpoint), clock=clock)
    assert isinstance(news_of(channel), Joined)
    agent.await_joined()
    die(channel)
    port = int(channel.endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)) as server:
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
        outcome = agent.end()
    assert isinstance(outcome, AgentTimeoutError)
    assert "silent for" in str(outcome)


def test_an_agent_ends_after_a_suspension_of_its_machine(
    frequent_beats: None, channel: AgentChannel, keys: JoinKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines may have been started elsewhere, whoever answers it now."""
    read, suspended_s = time.clock_gettime, 0.0

    def clock_gettime(clock: int) -> float:
        return read(clock) + (suspended_s if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", clock_gettime)
    agent = Agent(keys.ticket(channel.endpoint))
    assert isinstance(news_of(channel), Joined)
    agent.await_joined()
    suspended_s = TIMEOUT_S
    assert isinstance(agent.end(), AgentTimeoutError)


def test_an_agent_ends_when_its_own_words_are_not_answered(keys: JoinKeys, no_linger: None) -> None:
    """The link is cut in one direction: it hears its supervisor, which does not hear it."""
    context = SecureContext(keys.server, peer=keys.agents.public)
    with contextlib.closing(context):
        router, endpoint = context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        clock = Clock()
        agent = Agent(keys.ticket(endpoint), clock=clock)
        identity, *_ = router.recv_multipart()
        session = Session()

        def say(message: agent_messages.ToAgent) -> None:
            router.send_multipart([identity, *session.frames(to_agent.encode(message))])

        say(AgentWelcome(timeout_s=TIMEOUT_S, beat_s=0.1))
        agent.await_joined()
        clock.pass_time(TIMEOUT_S)
        while agent.is_alive():
            say(Beat(stamp=0.0))
            time.sleep(0.01)
        outcome = agent.end()
    assert isinstance(outcome, AgentTimeoutError)
    assert "silent for" in str(outcome)


def test_a_silent_agent_is_lost(keys: JoinKeys, tmp_path: Path) -> None:
    """It is stopped, or its link is cut: its connection is still there."""
    clock = Clock()
    with (
        listening(keys, tmp_path, timeout_s=TIMEOUT_S, clock=clock) as channel,
        contextlib.closing(RawAgent(channel, keys)) as raw,
    ):
        raw.say(HELLO)
        assert isinstance(news_of(channel), Joined)
        # In steps: at a leap the channel takes itself for stopped.
        while not (news := channel.take()):
            clock.pass_time(TIMEOUT_S / 6)
            channel.send("b", Beat())  # wakes it; nobody gets this
            time.sleep(0.01)
        (lost,) = news
    assert isinstance(lost, Lost)
    assert "silent" in lost.reason


def test_an_agent_comes_back_after_the_supervisor_was_stopped(
    keys: JoinKeys, tmp_path: Path, frequent_beats: None
) -> None:
    """Its connection was gone when the supervisor was stopped, which then nobody could reach."""
    clock = Clock()
    with listening(keys, tmp_path, timeout_s=TIMEOUT_S, clock=clock) as channel:
        with contextlib.closing(RawAgent(channel, keys)) as raw:
            raw.say(HELLO)
            assert isinstance(news_of(channel), Joined)
            raw.hear(AgentWelcome)
            (agent,) = channel._agents.values()
        await_true(lambda: agent.gone_at is not None, "its connection is gone")
        gone_at = agent.gone_at
        clock.pass_time(TIMEOUT_S / 2)
        await_true(lambda: agent.gone_at != gone_at or channel._news, "the channel has looked")
        with contextlib.closing(RawAgent(channel, keys)) as again:
            again.session = raw.session
            again.say(Seen(missing_paths=[]))
            assert isinstance(news_of(channel), Told)


def test_what_processes_print_comes_to_the_folder_of_the_logs(
    channel: AgentChannel, keys: JoinKeys, raw: RawAgent, tmp_path: Path
) -> None:
    raw.say(HELLO)
    raw.say(Printed(name="prefill-0", data=b"one\n"))
    raw.say(Printed(name="prefill-0", data=b"two\n"))
    raw.say(Seen(missing_paths=[]))
    while not isinstance(news_of(channel), Told):
        pass
    assert (tmp_path / "prefill-0").read_bytes() == b"one\ntwo\n"


def test_a_port_that_another_supervisor_has_is_named(keys: JoinKeys, tmp_path: Path) -> None:
    with listening(keys, tmp_path) as channel:
        port = int(channel.endpoint.rpartition(":")[2])
        second = JoinKeys(server=keys.server, agents=keys.agents, port=port)
        with (
            pytest.raises(StartupError, match="stop the supervisor that listens there"),
            listening(second, tmp_path),
        ):
            pass


def test_numbers_of_a_session_must_follow_each_other() -> None:
    ours, theirs = Session(), Session()
    assert theirs.payload(ours.frames(b"1")) == b"1"
    ours.frames(b"lost")
    with pytest.raises(ProtocolError, match="message 3 came after 1"):
        theirs.payload(ours.frames(b"3"))


def die(channel: AgentChannel) -> None:
    """End the thread as SIGKILL would: nobody is told, and nobody listens."""
    channel._agents.clear()
    channel._closing = True
    os.eventfd_write(channel._wake_event, 1)
    channel._thread.join(TIMEOUT_S)
    port = int(channel.endpoint.rpartition(":")[2])
    # ZMQ closes the socket in a thread of its own.
    await_true(lambda: probe_port("127.0.0.1", port) == PortState(), "the port is free")
