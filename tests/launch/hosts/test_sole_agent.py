"""One agent of a machine serves a host of a launch; who comes second is told of the first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdlaunch.errors import StartupError
from pdlaunch.launch.hosts.join import JoinKeys, new_join_keys, sole_agent, write_join_files
from tests.command_line import invoke
from tests.launch.hosts.test_agent_channel import listening

ENDPOINT = "tcp://127.0.0.1:9"
"""Nobody listens there."""


@pytest.fixture
def keys() -> JoinKeys:
    return new_join_keys()


def test_a_second_agent_is_refused_before_it_asks_anybody(keys: JoinKeys, tmp_path: Path) -> None:
    """It might be let in: the supervisor takes the first one for lost when that is stopped."""
    words = ["agent", "--join", str(tmp_path / "join"), "--name", "c"]
    with listening(keys, tmp_path) as channel:
        write_join_files(tmp_path / "join", keys, channel.endpoint)
        with sole_agent(keys.ticket(channel.endpoint), "c"):
            result = invoke(words)
        # It is gone now: this one asks the supervisor.
        asked = invoke(words)
    assert result.exit_code == 1
    said = result.output
    assert f"the agent with process id {os.getpid()} serves c of this launch" in said
    assert "end it, or choose another --name" in said
    assert "c is none of the hosts a, b" in asked.output


def test_other_hosts_and_other_launches_are_free(keys: JoinKeys) -> None:
    ticket, other = keys.ticket(ENDPOINT), new_join_keys().ticket(ENDPOINT)
    with sole_agent(ticket, "a"), sole_agent(ticket, "b"), sole_agent(other, "a"):
        with pytest.raises(StartupError, match="serves a of this launch"), sole_agent(ticket, "a"):
            pass
        # Who resumes a launch has the keys of the first one, be it at another port.
        resumed = keys.ticket("tcp://127.0.0.1:10")
        with pytest.raises(StartupError, match="serves a"), sole_agent(resumed, "a"):
            pass
