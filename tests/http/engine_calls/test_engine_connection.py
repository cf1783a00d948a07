"""Answers that come in pieces of any size, and what they leave behind on their connection."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from pdlaunch.http.engine_connection import MAX_HEAD_BYTES, Answer, CallError, EngineConnection

INTERIM = b"HTTP/1.1 103 Early Hints\r\nX-Name: early\r\n\r\n"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Name: it\r\nX-Empty:\r\n\r\n"
    b'5;a=b;c="d"\r\nwhole\r\n6\r\n body!\r\n0;e\r\nX-Trailer: 1\r\nX-Name: trailer\r\n\r\n'
)
SIZED = b"HTTP/1.1 429 No\r\nContent-Length: 11\r\nX-Empty:\r\nX-Name: it\r\n\r\nwhole body!"


class FakeTransport(asyncio.Transport):
    """Is a transport that sends nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = socket.socket()
        self._is_closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket if name == "socket" else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        return

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._is_closing

    def resume_reading(self) -> None:
        return

    def abort(self) -> None:
        self._is_closing = True

    def close_socket(self) -> None:
        self._socket.close()


class Calling:
    """A connection without an engine; the test says what comes."""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.resting: dict[EngineConnection, None] = {}
        self.connection = EngineConnection(self.resting)
        self.connection.connection_made(self.transport)

    def ask(self) -> Answer:
        self.resting.clear()
        return self.connection.call(b"", b"", None)

    def close(self) -> None:
        self.connection.connection_lost(None)
        self.transport.close_socket()


@pytest.fixture
async def calling() -> Any:
    calling = Calling()
    yield calling
    calling.close()


async def check(answer: Answer, status: int) -> None:
    await answer.head()
    assert (answer.status, answer.headers["x-name"]) == (status, "it")
    assert answer.headers["x-empty"] == ""
    assert "x-trailer" not in answer.headers
    assert await answer.read() == b"whole body!"


@pytest.mark.parametrize(("sent", "status"), [(INTERIM + CHUNKED, 200), (INTERIM + SIZED, 429)])
async def test_an_answer_is_the_same_wherever_it_is_split(
    calling: Calling, sent: bytes, status: int
) -> None:
    """All answers come over one connection, so that each finds what the one before has left."""
    for split in range(len(sent) + 1):
        answer = calling.ask()
        for piece in (sent[:split], sent[split:]):
            if piece:
                calling.connection.data_received(piece)
        await check(answer, status)
        assert list(calling.resting) == [calling.connection]
    answer = calling.ask()
    for number in range(len(sent)):
        assert not answer.has_ended
        calling.connection.data_received(sent[number : number + 1])
    await check(answer, status)
    assert not calling.transport.is_closing()


async def test_a_trailer_is_not_that_of_the_next_answer(calling: Calling) -> None:
    answer = calling.ask()
    calling.connection.data_received(CHUNKED)
    await check(answer, 200)
    answer = calling.ask()
    calling.connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await answer.head()
    assert answer.headers == {"content-length": "0"}


@pytest.mark.parametrize("line", [b"X: %b\r\n" % (b"x" * 1000), b"x" * 1000])
async def test_a_trailer_is_bounded(calling: Calling, line: bytes) -> None:
    answer = calling.ask()
    calling.connection.data_received(CHUNKED[: CHUNKED.index(b"X-Trailer")] + b"X: ")
    for _ in range(MAX_HEAD_BYTES // len(line) + 1):
        assert not calling.transport.is_closing() or answer.has_ended
        calling.connection.data_received(line)
    assert calling.transport.is_closing()
    with pytest.raises(CallError, match="trailer of its answer is too long"):
        await answer.read()


async def test_a_body_of_very_many_small_pieces_is_no_trailer(calling: Calling) -> None:
    answer = calling.ask()
    calling.connection.data_received(CHUNKED[: CHUNKED.index(b"5;a")])
    for _ in range(MAX_HEAD_BYTES // 4):
        calling.connection.data_received(b"1\r\nx")
        calling.connection.data_received(b"\r\n")
    calling.connection.data_received(b"0\r\n\r\n")
    assert await answer.read() == b"x" * (MAX_HEAD_BYTES // 4)


@pytest.mark.parametrize("sent", [CHUNKED, SIZED])
async def test_what_follows_an_answer_ends_its_connection(calling: Calling, sent: bytes) -> None:
    answer = calling.ask()
    calling.connection.data_received(sent + b"HTTP/1.1 200 OK\r\n")
    await answer.head()
    assert await answer.read() == b"whole body!"
    assert calling.transport.is_closing()
    assert not calling.connection.is_quiet()
