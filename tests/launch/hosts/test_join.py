"""The join file is for one user and one supervisor."""

import io
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.join import held_join_file, new_join_keys, read_ticket, write_join_files

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
        assert ticket.keys.secret not in repr(ticket)
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        assert modes == {"join": 0o600, "join.supervisor": 0o600}
    assert list(path.parent.iterdir()) == []


def test_it_can_come_over_standard_input(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_join_files(path, new_join_keys(), ENDPOINT)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert read_ticket("-") == read_ticket(str(path))


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    write_join_files(path, new_join_keys(), ENDPOINT)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"other users can read .* its mode is 640"):
        read_ticket(str(path))


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"no JSON", b'{"endpoint": 1}', b'{"endpoint": "\xff"}', b'{"a": ' * 99_999],
)
def test_another_file_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not a join file"):
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_keys_that_another_user_has_left_are_refused(path: Path) -> None:
    write_join_files(path, new_join_keys(), ENDPOINT)
    os.chown(path.parent / "join.supervisor", 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"), held_join_file(path):
        pass


def test_the_supervisor_after_a_killed_one_has_its_keys_and_port(path: Path) -> None:
    keys = new_join_keys()
    with held_join_file(path, 7070) as new:
        assert (new.port, new.server != keys.server) == (7070, True)
    write_join_files(path, keys, ENDPOINT)
    with held_join_file(path) as left:
        assert (left.server, left.agents, left.port) == (keys.server, keys.agents, 5555)
    write_join_files(path, keys, ENDPOINT)
    with held_join_file(path, 7070) as asked:
        assert (asked.server, asked.port) == (keys.server, 7070)
    (path.parent / "join.supervisor").write_text("no keys")
    with pytest.raises(ConfigError, match="does not hold the keys"), held_join_file(path):
        pass
