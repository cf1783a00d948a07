"""``serve --resume`` that fails leaves what a next try needs: the keys, and agents that wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdlaunch.cli.joining import joined_agents
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import StartupError
from pdlaunch.launch.hosts import agent_channel
from pdlaunch.launch.hosts.agent import AgentSession, SessionLostError
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import (
    JoinKeys,
    new_join_keys,
    read_resume_file,
    read_ticket,
    write_join_files,
)
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.machine_file import encode_machine

TIMEOUT_S = 60.0
HELLO = Join(name="a", address="127.0.0.1", machine=encode_machine(Machine(), {}), python="python")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "join"


@pytest.fixture
def keys(path: Path) -> JoinKeys:
    """Those that a killed supervisor has left."""
    keys = new_join_keys()
    write_join_files(path, keys, "tcp://127.0.0.1:0")
    path.unlink()
    return keys


def resume(path: Path, then: Callable[[], None], join_timeout_s: float = TIMEOUT_S) -> None:
    """Resume the launch with the agent of host a, then go on."""
    config = LaunchConfig.model_validate(
        {
            "placement": "hosts",
            "hosts": "a",
            "join_file": str(path),
            "control_address": "127.0.0.1",
            "join_timeout_s": join_timeout_s,
        }
    )
    with joined_agents(config, {}, path.parent, lambda line: None, resume=True):
        then()


def find_no_port() -> None:
    """Fail as a launch does before it starts anything."""
    raise StartupError("port 8000 is taken")


def test_keys_stay_where_nobody_joins(path: Path, keys: JoinKeys) -> None:
    for _ in range(2):
        with pytest.raises(StartupError, match="a did not join within"):
            resume(path, find_no_port, join_timeout_s=0.01)
        assert not path.exists(), "agents would be sent to nobody"
        assert read_resume_file(path).server == keys.server


def test_an_agent_waits_for_the_next_try(
    path: Path, keys: JoinKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_channel, "MAX_BEAT_S", 0.02)
    stop, stopper = os.pipe()
    ends: list[str] = []

    def serve() -> None:
        while not path.exists():
            time.sleep(0.01)
        ticket = read_ticket(str(path))
        while not ends or ends[-1] == "lost":
            session = AgentSession(ticket, HELLO, {}, [stop], first_wait_s=TIMEOUT_S, note=print)
            try:
                ends.append(session.run())
            except SessionLostError:
                ends.append("lost")

    agent = threading.Thread(target=serve, daemon=True)
    agent.start()
    with pytest.raises(StartupError, match="is taken"):
        resume(path, find_no_port)
    resume(path, lambda: None)
    agent.join(TIMEOUT_S)
    assert ends == ["lost", "the launch is over"]
    assert list(path.parent.glob("join*")) == [], "nothing is left to resume"
    os.close(stop)
    os.close(stopper)
