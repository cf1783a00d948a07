"""``serve --placement hosts`` and ``pdlaunch agent``, up to the point where engines would start."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
TIMEOUT_S = 180.0


class Commands:
    """Runs commands in a folder; what they print is in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with self.output(len(self.running)).open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "pdlaunch", *words],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        self.running.append(process)
        return process

    def output(self, number: int) -> Path:
        return self.folder / f"output-{number}"

    def said(self, process: subprocess.Popen[bytes]) -> str:
        return self.output(self.running.index(process)).read_text()

    def serve(self, *flags: str, agent_timeout_s: int = 60) -> subprocess.Popen[bytes]:
        return self.start(
            "serve",
            *("--placement", "hosts", "--hosts", "a,b", "--control-address", "127.0.0.1"),
            *("--port", "0", "--join-file", str(self.join)),
            *("--log-dir", str(self.folder / "logs"), "--agent-timeout", str(agent_timeout_s)),
            *flags,
        )

    @property
    def join(self) -> Path:
        return self.folder / "join"

    def agent(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        return self.start("agent", "--join", str(self.join), "--name", name, *flags)

    def until(self, process: subprocess.Popen[bytes], text: str, count: int = 1) -> None:
        """Wait until a process has printed something, so many times."""
        end_at = time.monotonic() + TIMEOUT_S
        while self.said(process).count(text) < count:
            assert time.monotonic() < end_at, self.said(process)
            assert process.poll() is None, self.said(process)
            time.sleep(0.05)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    for process in commands.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_the_next_supervisor_finds_the_agents_of_a_killed_one_and_names_who_has_not_joined(
    commands: Commands,
) -> None:
    first = commands.serve()
    commands.until(first, "pdlaunch agent --join")
    agent = commands.agent("a")
    commands.until(first, "a has joined from 127.0.0.1")
    # Killed at once, the supervisor might take the answer to the agent along.
    commands.until(agent, "joined as a")
    refused = commands.serve()
    assert refused.wait(TIMEOUT_S) == 2
    assert "another supervisor is using" in commands.said(refused)
    first.kill()
    first.wait()
    # The agent runs already: it needs no time to start.
    second = commands.serve("--join-timeout", "8")
    commands.until(agent, "joined as a", 2)
    assert second.wait(TIMEOUT_S) == 1
    said = commands.said(second)
    assert "a has joined" in said
    assert "error: b did not join within 8 s (join_timeout_s)" in said
    assert agent.wait(TIMEOUT_S) == 0
    assert "left: the launch is over" in commands.said(agent)
    assert not commands.join.exists()


def test_without_its_supervisor_an_agent_ends(commands: Commands) -> None:
    serve = commands.serve(agent_timeout_s=2)
    commands.until(serve, "pdlaunch agent --join")
    agent = commands.agent("a")
    commands.until(serve, "a has joined")
    commands.until(agent, "joined as a")
    serve.kill()
    assert agent.wait(TIMEOUT_S) == 1
    assert "error: the supervisor was silent for" in commands.said(agent)
