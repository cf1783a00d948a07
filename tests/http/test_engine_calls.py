"""Calls of engines: answers of every form, and connections that are used again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pdlaunch.http import engine_calls
from pdlaunch.http.engine_calls import Answer, CallError, EngineCalls
from pdlaunch.protocol.certificates import client_context, new_certificate, server_context
from tests.router.fake_engine import until

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = OK + b"Content-Length: 2\r\n\r\nok"


class Peer(asyncio.Protocol):
    def __init__(self, call: Call) -> None:
        self._call = call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._call.peers.append(transport)
        self._call.num_open += 1

    def data_received(self, data: bytes) -> None:
        self._call.requests.append(data)
        self._transport.write(self._call.says)

    def connection_lost(self, exc: Exception | None) -> None:
        self._call.num_open -= 1


class Call:
    """An engine, what it has got, and what calls it; the test writes its answers byte for byte."""

    def __init__(self) -> None:
        self.url = ""
        self.calls = EngineCalls(60.0)
        self.requests: list[bytes] = []
        self.peers: list[asyncio.Transport] = []
        self.num_open = 0
        self.says = b""
        """Answers each piece of a request."""

    @contextlib.asynccontextmanager
    async def listening(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Peer(self), "127.0.0.1", 0, ssl=tls)
        async with server:
            port = server.sockets[0].getsockname()[1]
            self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
            yield
            await self.calls.close()
            for peer in self.peers:
                peer.abort()

    async def asked(self, number: int = 1) -> asyncio.Transport:
        """Return the connection of the last request once there are so many."""
        await until(lambda: len(self.requests) >= number)
        return self.peers[-1]

    async def is_left(self) -> None:
        await until(lambda: not self.num_open)

    def begin(self, *, method: str = "POST", body: bytes = b"body") -> asyncio.Task[Answer]:
        headers = {"X-Request-Id": "r1"}
        return asyncio.ensure_future(self.calls.call(self.url, method, "/p?q=1", headers, body))

    async def begun(self, *pieces: bytes, closes: bool = False) -> Answer:
        calling = self.begin()
        peer = await self.asked(len(self.requests) + 1)
        for piece in pieces:
            peer.write(piece)
            await asyncio.sleep(0)
        if closes:
            peer.close()
        return await calling

    async def answered(self, *pieces: bytes, closes: bool = False) -> bytes:
        """Return the body of what the engine answers with these pieces."""
        answer = await self.begun(*pieces, closes=closes)
        try:
            return await answer.read()
        finally:
            answer.close()


@pytest.fixture
async def call(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Call]:
    # Connections rest for as long as a test takes on a busy machine.
    monkeypatch.setattr(engine_calls, "KEEPALIVE_S", 300.0)
    call = Call()
    async with call.listening():
        yield call


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ((OK[:9], OK[9:] + b"Content-Length: 5\r\n\r\n", b"wh", b"ole"), b"whole"),
        ((CHUNKED + b"2\r\nwh\r\n3\r", b"\nole\r\n0\r\n\r\n"), b"whole"),
        ((OK + b"content-length: 0\r\n\r\n",), b""),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), b""),
        # A redirect is not followed.
        ((b"HTTP/1.1 307 X\r\nLocation: http://x:1/\r\nContent-Length: 2\r\n\r\nno",), b"no"),
    ],
)
async def test_a_whole_answer_leaves_its_connection_to_the_next_call(
    call: Call, pieces: tuple[bytes, ...], body: bytes
) -> None:
    for _ in range(3):
        assert await call.answered(*pieces) == body
    assert len(call.peers) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection without an answer"),
        (OK + b"Content-Length: 9\r\n\r\nhalf", "closed the connection in the middle"),
        (CHUNKED + b"4\r\nhalf\r\n", "in the middle of its answer"),
        (b"not HTTP, my secret\r\n\r\n", "not valid HTTP"),
        (CHUNKED + b"no number, my secret\r\n", "not valid HTTP"),
        (OK + b"X: " + b"x" * 2 * 64 * 1024 + b"\r\n", "not valid HTTP"),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12", "not valid HTTP"),
        (OK + b"Content-Length: -1\r\n\r\n", "not valid HTTP"),
        (OK + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n", "not valid HTTP"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error_that_quotes_nothing(
    call: Call, answer: bytes, reason: str
) -> None:
    with pytest.raises(CallError, match=reason) as raised:
        await call.answered(answer, closes=True)
    assert not raised.value.not_received
    assert "secret" not in str(raised.value)


async def test_who_gives_up_an_answer_closes_its_connection(call: Call) -> None:
    calling = call.begin()
    await call.asked()
    calling.cancel()  # before its head
    await call.is_left()
    (await call.begun(OK + b"Content-Length: 9\r\n\r\nhalf")).close()
    await call.is_left()


async def test_an_answer_that_is_left_frees_its_connection_when_its_end_comes(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def left(end_s: float) -> Answer:
        monkeypatch.setattr(engine_calls, "END_S", end_s)
        answer = await call.begun(CHUNKED + b"5\r\nevent\r\n")
        assert await answer.read_some() == b"event"
        answer.leave()
        return answer

    answer = await left(300.0)
    call.peers[-1].write(b"0\r\n\r\n")
    await until(lambda: answer._response.closed)
    await left(0.0)
    assert len(call.peers) == 1
    await call.is_left()


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\0b"])
async def test_what_cannot_stand_in_a_request_is_not_sent(call: Call, value: str) -> None:
    with pytest.raises(CallError) as raised:
        await call.calls.call(call.url, "GET", "/", {"X-Id": value}, b"")
    assert raised.value.not_received
    assert not call.requests


async def test_an_engine_that_is_not_there_cannot_have_seen_the_request(tmp_path: Path) -> None:
    patient, hasty = EngineCalls(60.0), EngineCalls(0.05)
    with contextlib.ExitStack() as held:
        # The backlog is full, and nobody accepts.
        full = held.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        for calls, url, reason in (
            (patient, "http://127.0.0.1:1", "cannot connect"),
            (patient, f"unix:{tmp_path}/none.sock", "cannot connect"),
            (hasty, f"http://127.0.0.1:{full.getsockname()[1]}", r"no connection within 0\.05 s"),
        ):
            with pytest.raises(CallError, match=reason) as raised:
                await calls.call(url, "GET", "/", {}, b"")
            assert raised.value.not_received
    await patient.close()
    await hasty.close()


@pytest.mark.parametrize("server", ["own key", "other key", "no TLS"])
async def test_who_has_taken_an_engines_address_is_sent_nothing(server: str) -> None:
    own, other = new_certificate(), new_certificate()
    call = Call()
    call.calls, call.says = EngineCalls(60.0, client_context(own)), WHOLE
    keys = {"own key": server_context(own), "other key": server_context(other)}
    async with call.listening(keys.get(server)):
        call.url = call.url.replace("http://", "https://")
        if server == "own key":
            assert await call.answered() == b"ok"
            return
        with pytest.raises(CallError, match="cannot connect") as raised:
            await call.begin()
        assert raised.value.not_received
        assert b"X-Request-Id" not in b"".join(call.requests)


@pytest.mark.parametrize(("method", "is_repeated"), [("GET", True), ("POST", False)])
async def test_a_connection_that_closes_under_a_request(
    call: Call, method: str, is_repeated: bool
) -> None:
    """What asks for no work is asked again, as the engine may have closed what rested too long."""
    assert await call.answered(WHOLE) == b"ok"
    calling = call.begin(method=method)
    (await call.asked(2)).abort()
    if is_repeated:
        (await call.asked(3)).write(WHOLE)
        assert await (await calling).read() == b"ok"
        return
    with pytest.raises(CallError, match="without an answer") as raised:
        await calling
    assert not raised.value.not_received


async def test_no_proxy_is_asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await call.answered(WHOLE) == b"ok"
