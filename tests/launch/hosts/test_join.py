"""The join file is for one user and one supervisor; one agent of a machine serves a host."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.hosts.join import (
    held_join_file,
    new_join_keys,
    read_resume_file,
    read_ticket,
    sole_agent,
    write_join_files,
)
from tests.command_line import invoke
from tests.launch.hosts.test_agent_channel import listening

ENDPOINT = "tcp://10.0.0.1:5555"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "join"


def test_an_agent_gets_the_servers_public_key_and_a_pair_of_its_own(path: Path) -> None:
    keys = new_join_keys()
    with held_join_file(path):
        # Closed before secrets are in it.
        path.write_text("")
        path.chmod(0o644)
        write_join_files(path, keys, ENDPOINT)
        ticket = read_ticket(str(path))
        assert (ticket.endpoint, ticket.server_public) == (ENDPOINT, keys.server.public)
        assert keys.server.secret not in path.read_text()
        assert ticket.secret not in repr(ticket)
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        assert modes == {"join": 0o600, "join.supervisor": 0o600}
        assert read_resume_file(path).port == 5555
    assert list(path.parent.iterdir()) == []


def test_it_can_come_over_standard_input(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_join_files(path, new_join_keys(), ENDPOINT)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert read_ticket("-") == read_ticket(str(path))


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    write_join_files(path, new_join_keys(), ENDPOINT)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others can read .* its mode is 640"):
        read_ticket(str(path))


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"no JSON", b'{"endpoint": 1}', b'{"endpoint": "\xff"}', b'{"a": ' * 99_999],
)
def test_another_file_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be joined with"):
        read_ticket(str(path))


def test_the_file_is_not_there_before_it_is_whole(path: Path) -> None:
    write_join_files(path, new_join_keys(), "tcp://10.0.0.9:1")
    with held_join_file(path):
        assert not path.exists()
        write_join_files(path, new_join_keys(), ENDPOINT)
        with path.open("rb") as held:
            write_join_files(path, new_join_keys(), ENDPOINT)
            assert held.read() != path.read_bytes(), "replaced, not written over"


def test_the_second_supervisor_of_a_secret_is_refused(path: Path) -> None:
    with held_join_file(path):
        write_join_files(path, new_join_keys(), ENDPOINT)
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="another supervisor is using"), held_join_file(path):
            pass
        assert path.read_bytes() == before


def test_without_a_dead_supervisor_there_is_nothing_to_resume(path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        read_resume_file(path)
    with (
        held_join_file(path),
        pytest.raises(ConfigError, match=r"nothing to resume .*: no supervisor was killed there"),
    ):
        read_resume_file(path)


def test_a_second_agent_is_refused_before_it_asks_anybody(path: Path, tmp_path: Path) -> None:
    """It might be let in: the supervisor takes the first one for lost when that is stopped."""
    words, keys = ["agent", "--join", str(path), "--name", "c"], new_join_keys()
    with listening(keys, tmp_path) as channel:
        write_join_files(path, keys, channel.endpoint)
        with sole_agent(keys.ticket(channel.endpoint), "c"):
            result = invoke(words)
        # It is gone now: this one asks the supervisor.
        asked = invoke(words)
    assert result.exit_code == 1
    assert "another agent serves c of this launch on this machine already" in result.output
    assert "end it, or choose another --name" in result.output
    assert "c is none of the hosts a, b" in asked.output


def test_other_hosts_and_other_launches_are_free() -> None:
    keys = new_join_keys()
    ticket, other = keys.ticket(ENDPOINT), new_join_keys().ticket(ENDPOINT)
    with sole_agent(ticket, "a"), sole_agent(ticket, "b"), sole_agent(other, "a"):
        # Who resumes a launch has the keys of the first one, be it at another port.
        for same in (ticket, keys.ticket("tcp://127.0.0.1:10")):
            with pytest.raises(StartupError, match="serves a of this"), sole_agent(same, "a"):
                pass
