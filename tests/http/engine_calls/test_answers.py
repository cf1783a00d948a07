"""Calls of engines: answers of every form, silences, and connections that are used again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pdlaunch.http import engine_connection
from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.engine_connection import (
    HIGH_WATER_BYTES,
    MAX_HEAD_BYTES,
    Answer,
    CallError,
    Silence,
)
from pdlaunch.protocol.certificates import client_context, new_certificate, server_context
from tests.http.engine_calls.server import CHUNKED, OK, Call, Peer, Server
from tests.router.fake_engine import until


async def test_a_request_is_sent_and_its_answer_told(call: Call) -> None:
    calling = call.begin()
    peer = await call.server.asked()
    peer.write(b"HTTP/1.1 429 No\r\nContent-Length: 4\r\nX-Name: \xc3\xa9\r\n\r\nbody")
    answer = await calling
    assert (answer.status, answer.headers["x-name"]) == (429, "\xe9")
    assert await answer.read() == b"body"
    answer.close()
    assert b"POST /p?q=1 HTTP/1.1\r\nHost: 127.0.0.1:" in call.server.requests[0]
    assert call.server.requests[0].endswith(b"X-Request-Id: r1\r\n\r\nbody")


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ((OK + b"Content-Length: 5\r\n\r\nwhole",), b"whole"),
        ((OK[:9], OK[9:] + b"Content-Length: 5\r\n\r\n", b"wh", b"ole"), b"whole"),
        (
            (CHUNKED + b"2\r\nwh\r\n3\r", b"\nole\r\n0\r\n\r\n"),
            b"whole",
        ),
        ((OK + b"content-length: 0\r\n\r\n",), b""),
        ((CHUNKED + b"2;a=b\r\nwh\r\n3\r\nole\r\n0;e\r\nX-Sum: 1\r\n\r\n",), b"whole"),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), b""),
        ((b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",), b""),
        (
            (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", OK + b"Content-Length: 1\r\n\r\n1"),
            b"1",
        ),
    ],
)
async def test_a_whole_answer_leaves_its_connection_to_the_next_call(
    call: Call, pieces: tuple[bytes, ...], body: bytes
) -> None:
    for _ in range(3):
        assert await call.answered(*pieces) == body
    assert len(call.server.peers) == 1


@pytest.mark.parametrize(
    ("answer", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
    ],
)
async def test_a_connection_that_ends_with_its_answer_is_not_used_again(
    call: Call, answer: bytes, closes: bool
) -> None:
    for number in (1, 2):
        assert await call.answered(answer, closes=closes) == b"ok"
        await call.server.closed.wait()
        assert len(call.server.peers) == number


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection without an answer"),
        (OK, "closed the connection without an answer"),
        (OK + b"Content-Length: 9\r\n\r\nhalf", "closed the connection in the middle"),
        (CHUNKED + b"4\r\nhalf\r\n", "in the middle of its answer"),
        (b"not HTTP, my secret\r\n\r\n", "no valid HTTP"),
        (CHUNKED + b"no number\r\n", "no valid HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "HTTP"),
        (OK + b"X: " + b"x" * MAX_HEAD_BYTES, "head of its answer is too long"),
        (b"HTTP/1.1 200 " + b"x" * MAX_HEAD_BYTES, "head of its answer is too long"),
        (b"HTTP/1.1 100 Go on\r\n\r\n" * 4000, "head of its answer is too long"),
        (b"HTTP/1.1 099 Odd\r\nContent-Length: 1\r\n\r\n1" + OK + b"\r\n", "no valid HTTP"),
        (b"HTTP/3.1 200 OK\r\nContent-Length: 0\r\n\r\n", "no valid HTTP"),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12", "no valid HTTP"),
        (OK + b"Content-Length: 1, 1\r\n\r\n1", "no valid HTTP"),
        (OK + b"Content-Length: -1\r\n\r\n", "no valid HTTP"),
        (OK + b"Content-Length: %d\r\n\r\n" % 2**64, "no valid HTTP"),
        (CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n", "no valid HTTP"),
        (OK + b"X: a\r\n folded\r\nContent-Length: 0\r\n\r\n", "no valid HTTP"),
        (OK + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n", "no valid HTTP"),
        (CHUNKED + b"f" * 17 + b"\r\n", "no valid HTTP"),
        (CHUNKED + b"-1\r\n", "no valid HTTP"),
        (OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", "in the middle"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error_that_quotes_nothing(
    call: Call, answer: bytes, reason: str
) -> None:
    with pytest.raises(CallError, match=reason) as raised:
        await call.answered(answer, closes=True)
    assert not raised.value.unheard
    assert "secret" not in str(raised.value)


async def test_what_came_before_the_connection_broke_is_read_first(call: Call) -> None:
    calling = call.begin()
    peer = await call.server.asked()
    peer.write(CHUNKED + b"5\r\nfirst\r\n")
    answer = await calling
    peer.abort()
    assert await answer.read_some() == b"first"
    with pytest.raises(CallError):
        await answer.read_some()
    answer.close()


async def test_an_answer_that_nobody_has_asked_for_reaches_no_later_call(call: Call) -> None:
    once = OK + b"Content-Length: 2\r\n\r\n"
    assert await call.answered(once + b"ok" + once) == b"ok"
    assert await call.answered(once + b"my") == b"my"
    assert len(call.server.peers) == 2
    # Nor one that comes while the connection rests.
    call.server.closed.clear()
    call.server.peers[-1].write(once + b"no")
    await call.server.closed.wait()
    assert await call.answered(once + b"me") == b"me"


async def test_who_gives_up_an_answer_closes_its_connection(call: Call) -> None:
    calling = call.begin()
    peer = await call.server.asked()
    calling.cancel()  # before its head
    await call.server.closed.wait()
    call.server.closed.clear()
    calling = call.begin()
    peer = await call.server.asked(2)
    peer.write(OK + b"Content-Length: 9\r\n\r\nhalf")
    (await calling).close()
    await call.server.closed.wait()


async def test_an_answer_that_is_left_frees_its_connection_when_its_end_comes(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def left() -> asyncio.Transport:
        calling = call.begin()
        peer = await call.server.asked(len(call.server.requests) + 1)
        peer.write(CHUNKED + b"5\r\nevent\r\n")
        answer = await calling
        assert await answer.read_some() == b"event"
        answer.leave()
        return peer

    (await left()).write(b"0\r\n\r\n")
    await until(lambda: call.calls._resting[call.url])
    monkeypatch.setattr(engine_connection, "END_S", 0.0)
    await left()
    assert len(call.server.peers) == 1
    await call.server.closed.wait()


async def test_a_connection_that_the_server_has_closed_is_not_used(call: Call) -> None:
    whole = OK + b"Content-Length: 2\r\n\r\nok"
    assert await call.answered(whole) == b"ok"
    call.server.peers[-1].close()
    await until(lambda: not call.calls._resting[call.url])
    assert await call.answered(whole) == b"ok"


async def test_a_slow_reader_makes_the_engine_wait(call: Call) -> None:
    length = 4 * HIGH_WATER_BYTES
    calling = call.begin()
    peer = await call.server.asked()
    peer.write(OK + b"Content-Length: %d\r\n\r\n" % length + bytes(length))
    answer = await calling
    await until(lambda: not answer._connection.transport.is_reading())
    assert answer._num_bytes < length
    assert await answer.read() == bytes(length)
    answer.close()


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("/", "a\r\nX-Other: b", "control character"),
        ("/", "a\nb", "control character"),
        ("/", "a\0b", "control character"),
        ("/", "\ud800", "half a character"),
        ("/a HTTP/1.0", "a", "a space"),
        ("/a\r\nX: b", "a", "control character"),
    ],
)
async def test_what_cannot_stand_in_a_request_is_not_sent(
    call: Call, target: str, value: str, reason: str
) -> None:
    with pytest.raises(CallError, match=reason) as raised:
        await call.calls.call(call.url, "GET", target, {"X-Id": value}, b"")
    assert raised.value.unheard
    assert not call.server.peers


async def test_a_server_that_closes_what_it_accepts_is_not_waited_for(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peer, "connection_made", lambda self, transport: transport.abort())
    for _ in range(5):
        with pytest.raises(CallError, match="closed the connection"):
            await call.begin()
    # Known before the call: nothing was sent.
    connection = await call.calls._connect(call.url, {})
    await until(lambda: connection.transport.is_closing())
    with pytest.raises(CallError, match="at once") as raised:
        await connection.call(b"", b"", None).head()
    assert raised.value.unheard


async def test_an_engine_that_is_not_there_cannot_have_seen_the_request(tmp_path: Path) -> None:
    calls = EngineCalls(5.0)
    for url in ("http://127.0.0.1:1", f"unix:{tmp_path}/none.sock"):
        with pytest.raises(CallError, match="cannot connect") as raised:
            await calls.call(url, "GET", "/", {}, b"")
        assert raised.value.unheard


class Alive:
    """Finds the engine alive until it is said to be dead."""

    def __init__(self) -> None:
        self.number = 0
        self.is_dead = False

    async def __call__(self) -> None:
        self.number += 1
        if self.is_dead:
            raise TimeoutError("dead")


async def test_silence_is_looked_into_again_and_again_and_bytes_end_it(call: Call) -> None:
    alive = Alive()
    calling = call.begin(Silence(0.01, alive))
    peer = await call.server.asked()
    await until(lambda: alive.number >= 3)
    peer.write(OK + b"Content-Length: 2\r\n\r\no")
    answer = await calling
    assert await answer.read_some() == b"o"
    before = alive.number
    reading = asyncio.ensure_future(answer.read_some())
    await until(lambda: alive.number >= before + 3)
    alive.is_dead = True
    with pytest.raises(TimeoutError, match="dead"):
        await reading
    answer.close()


async def test_an_answer_that_nobody_waits_for_is_left_alone(call: Call) -> None:
    alive = Alive()
    calling = call.begin(Silence(0.01, alive))
    (await call.server.asked()).write(OK + b"Content-Length: 2\r\n\r\no")
    answer = await calling
    before, looks = alive.number, _count(answer)
    await until(lambda: looks() >= 3)  # a slow client: nothing is read meanwhile
    assert alive.number == before
    answer.close()


def _count(answer: Answer) -> Callable[[], int]:
    """Return what counts how often the timer has fired."""
    look, fired = answer._look, [0]

    def counted() -> None:
        fired[0] += 1
        look()

    answer._look = counted  # type: ignore[method-assign] # what is scheduled next
    return lambda: fired[0]


async def test_sockets_and_tls(tmp_path: Path) -> None:
    pair, server, loop = new_certificate(), Server(), asyncio.get_running_loop()
    path = str(tmp_path / "engine.sock")
    whole = OK + b"Content-Length: 2\r\n\r\nok"
    async with (
        await loop.create_unix_server(server, path),
        await loop.create_server(server, "127.0.0.1", 0, ssl=server_context(pair)) as listening,
    ):
        port = listening.sockets[0].getsockname()[1]
        for url, tls in (
            (f"unix:{path}", None),
            (f"https://127.0.0.1:{port}", client_context(pair)),
        ):
            call = Call(server, url, tls)
            assert [await call.answered(whole) for _ in range(2)] == [b"ok", b"ok"]
            call.calls.close()
        stranger = Call(server, f"https://127.0.0.1:{port}")
        with pytest.raises(CallError, match="cannot connect"):
            await stranger.begin()
    assert len(server.peers) == 2
    assert b"\r\nHost: localhost\r\n" in server.requests[0]
