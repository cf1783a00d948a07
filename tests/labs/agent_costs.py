"""Measures the channel to agents with many of them, for ``control_plane``.

The supervisor's end is the real one, over TCP with CURVE. One other process, which runs this module
too, stands for all agents: each joins, beats its heart as often as it is told to, and answers when
it is asked to look at files.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.engines.native import python_command
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Joined, News, Told
from pdlaunch.launch.hosts.agent_messages import (
    AgentWelcome,
    Beat,
    FromAgent,
    Join,
    Look,
    Seen,
    Session,
    from_agent,
    to_agent,
)
from pdlaunch.launch.hosts.join import JoinTicket, new_join_keys
from pdlaunch.machine.machine_file import encode_machine
from pdlaunch.machine.probe import probe_machine
from pdlaunch.protocol.process.bootstrap import raise_open_files
from pdlaunch.protocol.sockets import SecureContext
from tests.labs.simulated_engines import SOCKETS_PER_CONTEXT

TURN_S = 0.02
"""Messages are looked for this often: a poll of thousands of sockets takes milliseconds."""
SETTLE_S = 3.0


class SimulatedAgent:
    """Says on the channel what an agent says."""

    def __init__(self, socket: Any, join: Join) -> None:
        self.socket = socket
        self.num_messages = 0
        self._session = Session()
        self._beat_s = float("inf")
        self._beats_at = float("inf")
        self._say(join)

    def turn(self, now: float) -> None:
        """Take what has come, and beat when it is time."""
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            match to_agent.decode(self._session.payload(self.socket.recv_multipart())):
                case AgentWelcome(beat_s=beat_s):
                    self._beat_s = beat_s
                    # Agents do not beat as one.
                    self._beats_at = now + beat_s * secrets.randbelow(1000) / 1000
                case Look():
                    self._say(Seen(missing_paths=[]))
                case _:
                    pass
            self.num_messages += 1
        if now >= self._beats_at:
            self._beats_at = now + self._beat_s
            self._say(Beat(stamp=now))

    def _say(self, message: FromAgent) -> None:
        self.socket.send_multipart(self._session.frames(from_agent.encode(message)))
        self.num_messages += 1


def simulate() -> None:
    """Be as many agents as the first line of standard input says, until it ends.

    Each other line is answered by the number of messages so far.
    """
    raise_open_files()
    first = json.loads(sys.stdin.readline())
    ticket = msgspec.convert(first["ticket"], JoinTicket)
    machine = encode_machine(probe_machine(), os.environ)
    agents: list[SimulatedAgent] = []
    context: SecureContext | None = None
    for index in range(first["agents"]):
        if index % SOCKETS_PER_CONTEXT == 0:
            context = SecureContext(ticket.keys, peer=ticket.server_public)
        assert context is not None
        identity = secrets.token_bytes(16)
        socket = context.connect(zmq.DEALER, ticket.endpoint, identity=identity)
        join = Join(
            name=f"host-{index}", address="10.0.0.1", machine=machine, python=sys.executable
        )
        agents.append(SimulatedAgent(socket, join))
    while True:
        now = time.monotonic()
        for agent in agents:
            agent.turn(now)
        if select.select([sys.stdin], [], [], TURN_S)[0]:
            if not sys.stdin.readline():
                os._exit(0)
            num_messages = sum(agent.num_messages for agent in agents)
            print(num_messages, flush=True)  # noqa: T201


@contextlib.contextmanager
def simulated_agents(ticket: JoinTicket, num_agents: int) -> Iterator[subprocess.Popen[str]]:
    """Run the process that stands for all agents."""
    command = python_command("tests.labs.agent_costs")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        first = {"ticket": msgspec.to_builtins(ticket), "agents": num_agents}
        process.stdin.write(json.dumps(first) + "\n")
        process.stdin.flush()
        yield process
        process.stdin.close()


def num_messages(process: subprocess.Popen[str]) -> int:
    """Return how many messages the agents have sent and received."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def take(channel: AgentChannel, kind: type[News], number: int) -> None:
    """Wait for so many pieces of news of a kind; others are a mistake."""
    while number:
        select.select([channel.fileno()], [], [])
        for news in channel.take():
            assert isinstance(news, kind), news
            number -= 1


def measure(num_agents: int, rest_s: float) -> dict[str, float]:
    """Return the costs of one launch's agents."""
    keys, names = new_join_keys(), [f"host-{index}" for index in range(num_agents)]
    with tempfile.TemporaryDirectory() as folder:
        channel = AgentChannel(
            keys,
            "127.0.0.1",
            names,
            timeout_s=LaunchConfig().agent_timeout_s,
            print_to=Path(folder).joinpath,
        )
        with (
            contextlib.closing(channel),
            simulated_agents(keys.ticket(channel.endpoint), num_agents) as agents,
        ):
            began_at, began_s = time.monotonic(), time.process_time()
            take(channel, Joined, num_agents)
            join_at, join_s = time.monotonic() - began_at, time.process_time() - began_s

            time.sleep(SETTLE_S)
            before, began_at, began_s = (
                num_messages(agents),
                time.monotonic(),
                time.process_time(),
            )
            time.sleep(rest_s)
            at_rest_s = time.monotonic() - began_at
            beats = (num_messages(agents) - before) / at_rest_s
            share = (time.process_time() - began_s) / at_rest_s

            began_at, began_s = time.monotonic(), time.process_time()
            for name in names:
                channel.send(name, Look(paths=[]))
            take(channel, Told, num_agents)
            beating_s = share * (time.monotonic() - began_at)
            asked_s = time.process_time() - began_s - beating_s
    return {
        "all have joined: s": join_at,
        "CPU s": join_s,
        "at rest: messages/s": beats,
        "CPU %": 100 * share,
        "all are asked and answer: CPU ms": 1000 * asked_s,
    }


def table(numbers: Sequence[int], rest_s: float) -> str:
    """Return a table of Markdown, a row for each number of agents."""
    rows = {number: measure(number, rest_s) for number in numbers}
    heads = ["agents", *rows[numbers[0]]]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for number, found in rows.items():
        lines.append(f"| {number} | {' | '.join(f'{value:.3g}' for value in found.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    simulate()
