"""Descriptors over a Unix socket: to processes with the token alone, and what is left when either
side goes.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator

import pytest

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors import fd_channel
from pdlaunch.transfer.connectors.fd_channel import TOKEN_BYTES, FdConnection, FdServer, fetch_fds
from tests.engine.memory.open_files import num_open_fds

TIMEOUT_S = 60.0


@pytest.fixture
def files() -> Iterator[list[int]]:
    found = [os.memfd_create(f"test-{index}") for index in range(3)]
    for index, fd in enumerate(found):
        os.write(fd, bytes([index]) * 4)
    yield found
    for fd in found:
        os.close(fd)


@pytest.fixture
def server(files: list[int]) -> Iterator[FdServer]:
    server = FdServer(files)
    yield server
    server.close()
    server._thread.join(TIMEOUT_S)
    assert not server._thread.is_alive()


def let_go(connection: FdConnection) -> None:
    connection.close_fds()
    connection.close()


def content(fd: int) -> bytes:
    return os.pread(fd, 10, 0)


@pytest.mark.processes
def test_the_same_files_arrive_in_their_order(server: FdServer) -> None:
    connection = fetch_fds(server.address, server.token, 3, TIMEOUT_S)
    assert [content(fd) for fd in connection.fds] == [b"\0\0\0\0", b"\1\1\1\1", b"\2\2\2\2"]
    assert not any(os.get_inheritable(fd) for fd in connection.fds)
    let_go(connection)


def test_there_may_be_no_files_at_all() -> None:
    server = FdServer([])
    connection = fetch_fds(server.address, server.token, 0, TIMEOUT_S)
    assert connection.fds == []
    assert not server.wait_unused(0)
    connection.close()
    assert server.wait_unused(TIMEOUT_S)
    server.close()


@pytest.mark.parametrize("token", [b"", b"x", b"x" * TOKEN_BYTES, b"x" * 1000])
def test_without_the_token_nothing_is_handed_over(server: FdServer, token: bytes) -> None:
    before = num_open_fds()
    with pytest.raises(TransferError, match="no memory was handed over"):
        fetch_fds(server.address, token, 3, TIMEOUT_S)
    assert num_open_fds() <= before + 1, "the server may be about to close its end"
    assert server.wait_unused(0)
    let_go(fetch_fds(server.address, server.token, 3, TIMEOUT_S))


def test_another_number_of_files_than_was_told_is_refused_and_closed(server: FdServer) -> None:
    with pytest.raises(TransferError, match="3 descriptors came, 2 were expected"):
        fetch_fds(server.address, server.token, 2, TIMEOUT_S)
    assert server.wait_unused(TIMEOUT_S)


def test_another_user_is_refused(server: FdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_channel.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransferError, match=r"belongs to uid|reset|refused|no answer"):
        fetch_fds(server.address, server.token, 3, TIMEOUT_S)


def test_the_owner_knows_until_when_its_memory_is_in_use(server: FdServer) -> None:
    first, second = (fetch_fds(server.address, server.token, 3, TIMEOUT_S) for _ in range(2))
    let_go(first)
    server.close()
    assert not server.wait_unused(0)
    let_go(second)
    assert server.wait_unused(TIMEOUT_S)


def test_after_its_end_an_owner_hands_over_nothing(files: list[int]) -> None:
    before = num_open_fds()
    server = FdServer(files)
    address, token = server.address, server.token
    server.close()
    server._thread.join(TIMEOUT_S)
    with pytest.raises(TransferError, match="refused"):
        fetch_fds(address, token, 3, TIMEOUT_S)
    assert num_open_fds() == before


def test_an_owner_that_does_not_answer_is_given_up(server: FdServer) -> None:
    """As one that was stopped: the kernel takes the connection, and nobody reads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        name = f"pdlaunch-test-silent-{os.getpid()}"
        silent.bind(f"\0{name}")
        silent.listen()
        before = num_open_fds()
        with pytest.raises(TransferError, match="timed out"):
            fetch_fds(name, b"token", 1, timeout_s=0.01)
        assert num_open_fds() == before


def fetch_and_wait(address: str, token: bytes, pipe: object) -> None:
    connection = fetch_fds(address, token, 3, TIMEOUT_S)
    pipe.send([content(fd) for fd in connection.fds])  # type: ignore[attr-defined]
    pipe.recv()  # type: ignore[attr-defined]


@pytest.mark.processes
def test_a_killed_reader_uses_nothing_any_more(server: FdServer) -> None:
    context = multiprocessing.get_context("forkserver")
    pipe, child_end = context.Pipe()
    process = context.Process(target=fetch_and_wait, args=(server.address, server.token, child_end))
    process.start()
    assert pipe.recv() == [bytes([index]) * 4 for index in range(3)]
    assert not server.wait_unused(0)
    process.kill()
    process.join()
    assert server.wait_unused(TIMEOUT_S)
