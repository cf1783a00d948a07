"""Calls of engines: answers of every form, silences, and connections that are used again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pdlaunch.http import engine_calls, engine_connection
from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.engine_connection import (
    HIGH_WATER_BYTES,
    MAX_HEAD_BYTES,
    Answer,
    CallError,
    Silence,
)
from pdlaunch.process.bootstrap import LISTEN_BACKLOG
from pdlaunch.protocol.certificates import client_context, new_certificate, server_context
from tests.router.fake_engine import until

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Server:
    """Accepts connections; the test writes what it answers, byte for byte."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.peers: list[asyncio.Transport] = []
        self.closed = asyncio.Event()
        self.num_open = 0
        self.says = b""
        """Answers each piece of a request."""

    def __call__(self) -> asyncio.Protocol:
        return _Peer(self)

    async def asked(self, number: int = 1) -> asyncio.Transport:
        """Return the connection of the last request once there are so many."""
        await until(lambda: len(self.requests) >= number)
        return self.peers[-1]


class _Peer(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.peers.append(transport)
        self._server.num_open += 1

    def data_received(self, data: bytes) -> None:
        self._server.requests.append(data)
        self._transport.write(self._server.says)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.num_open -= 1
        self._server.closed.set()


class Call:
    """A server, and what calls it."""

    def __init__(self, server: Server, url: str, tls: ssl.SSLContext | None = None) -> None:
        self.server = server
        self.url = url
        self.calls = EngineCalls(60.0, tls)

    async def call(
        self, silence: Silence | None = None, *, method: str = "POST", body: bytes = b"body"
    ) -> Answer:
        headers = {"X-Request-Id": "r1"}
        return await self.calls.call(self.url, method, "/p?q=1", headers, body, silence)

    def begin(
        self, silence: Silence | None = None, *, method: str = "POST", body: bytes = b"body"
    ) -> asyncio.Task[Answer]:
        return asyncio.ensure_future(self.call(silence, method=method, body=body))

    async def answered(self, *pieces: bytes, closes: bool = False, method: str = "POST") -> bytes:
        """Return the body of what the server answers with these pieces."""
        calling = self.begin(method=method)
        peer = await self.server.asked(len(self.server.requests) + 1)
        for piece in pieces:
            peer.write(piece)
            await asyncio.sleep(0)
        if closes:
            peer.close()
        answer = await calling
        try:
            return await answer.read()
        finally:
            answer.close()


@pytest.fixture(autouse=True)
def _is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections rest for as long as a test takes on a busy machine."""
    monkeypatch.setattr(engine_connection, "KEEPALIVE_S", 300.0)
    monkeypatch.setattr(engine_connection, "END_S", 300.0)


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    server = Server()
    loop = asyncio.get_running_loop()
    async with await loop.create_server(server, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        call = Call(server, f"http://127.0.0.1:{port}")
        yield call
        call.calls.close()
        for peer in server.peers:
            peer.abort()


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
    monkeypatch.setattr(_Peer, "connection_made", lambda self, transport: transport.abort())
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
            (f"https://127.0.0.1:{port}", client_context(pair.certificate)),
        ):
            call = Call(server, url, tls)
            assert [await call.answered(whole) for _ in range(2)] == [b"ok", b"ok"]
            call.calls.close()
        stranger = Call(server, f"https://127.0.0.1:{port}")
        with pytest.raises(CallError, match="cannot connect"):
            await stranger.begin()
    assert len(server.peers) == 2
    assert b"\r\nHost: localhost\r\n" in server.requests[0]


WHOLE = OK + b"Content-Length: 2\r\n\r\nok"


async def test_an_answer_that_ends_in_the_piece_that_was_too_much_leaves_its_connection_readable(
    call: Call,
) -> None:
    calling = call.begin()
    peer = await call.server.asked()
    peer.write(CHUNKED + b"1\r\n1\r\n")
    answer = await calling
    connection = answer._connection
    # As one piece: a reader that does not come finds both, and the reading stopped.
    connection.data_received(b"%x\r\n%b\r\n0\r\n\r\n" % (2 * HIGH_WATER_BYTES, bytes(2**20)))
    assert len(await answer.read()) == 1 + 2**20
    assert await call.answered(WHOLE) == b"ok"
    assert len(call.server.peers) == 1


@pytest.mark.parametrize("ends", [True, False])
async def test_what_came_while_a_connection_rested_ends_it_though_nobody_has_seen_it(
    tmp_path: Path, ends: bool
) -> None:
    server, path = Server(), str(tmp_path / "engine.sock")
    server.says = WHOLE
    # A Unix socket: what is written has come by the next line.
    async with await asyncio.get_running_loop().create_unix_server(server, path):
        call = Call(server, f"unix:{path}")
        assert await call.answered() == b"ok"
        # The event loop has no turn between this and the call.
        if ends:
            server.peers[-1].write_eof()
        else:
            server.peers[-1].write(OK + b"Content-Length: 2\r\n\r\nno")
        answer = await call.call()
        assert await answer.read() == b"ok"
        assert len(server.peers) == 2
        call.calls.close()
        await until(lambda: server.num_open == 0)


@pytest.mark.parametrize(("method", "is_repeated"), [("GET", True), ("POST", False)])
async def test_a_connection_that_closes_under_a_request(
    call: Call, method: str, is_repeated: bool
) -> None:
    """What asks for no work is asked again, as the engine may have closed what rested too long."""
    assert await call.answered(WHOLE) == b"ok"
    calling = call.begin(method=method)
    (await call.server.asked(2)).abort()
    if is_repeated:
        (await call.server.asked(3)).write(WHOLE)
        assert await (await calling).read() == b"ok"
        # Once: a new connection that closes says something of the engine.
        call.server.peers[-1].abort()
        await until(lambda: not call.calls._resting[call.url])
        calling = call.begin(method=method)
        (await call.server.asked(4)).abort()
    with pytest.raises(CallError, match="without an answer") as raised:
        await calling
    assert not raised.value.unheard


async def test_an_answer_to_head_ends_with_its_head(call: Call) -> None:
    head = OK + b"Content-Length: 2\r\n\r\n"
    assert await call.answered(head, method="HEAD") == b""
    await call.server.closed.wait()
    assert await call.answered(head + b"ok", method="HEAD") == b""
    assert await call.answered(head + b"ok") == b"ok"


@pytest.mark.parametrize("answer", [b"", WHOLE])
async def test_an_engine_that_reads_no_request_to_its_end_keeps_no_connection(
    call: Call, answer: bytes
) -> None:
    """It answers, or closes its side alone, while most of the request is yet to be sent."""
    long = bytes(2**25)
    calling = call.begin(body=long)
    peer = await call.server.asked()
    peer.pause_reading()
    if answer:
        peer.write(answer)
        assert await (await calling).read() == b"ok"
    else:
        peer.write_eof()
        with pytest.raises(CallError, match="without an answer"):
            await calling
    peer.resume_reading()
    await call.server.closed.wait()
    assert sum(map(len, call.server.requests)) < len(long)


async def test_a_body_that_is_too_long_is_an_error(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_connection, "MAX_BODY_BYTES", 3)
    assert await call.answered(OK + b"Content-Length: 3\r\n\r\n123") == b"123"
    with pytest.raises(CallError, match="more than 3 bytes"):
        await call.answered(OK + b"Content-Length: 4\r\n\r\n1234")


async def test_a_call_that_is_cancelled_anywhere_leaves_nothing(call: Call) -> None:
    call.server.says = WHOLE
    before = asyncio.all_tasks()

    async def work() -> None:
        answer = await call.call()
        try:
            await answer.read()
        finally:
            answer.close()

    for num_turns in itertools.count():
        call.calls.close()
        await until(lambda: not call.calls._resting.get(call.url))
        task = asyncio.ensure_future(work())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if not task.cancel():
            break
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert num_turns > 4
    # By the time of a further answer the server has accepted all connections.
    assert await call.answered() == b"ok"
    call.calls.close()
    await until(lambda: call.server.num_open == 0)
    assert asyncio.all_tasks() == before


async def test_no_proxy_is_asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:1")
    assert await call.answered(WHOLE) == b"ok"


@pytest.mark.parametrize(("address", "host"), [("::1", "[::1]"), ("127.0.0.1", "localhost")])
async def test_names_and_addresses_of_both_kinds(address: str, host: str) -> None:
    server = Server()
    server.says = WHOLE
    try:
        listening = await asyncio.get_running_loop().create_server(server, address, 0)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        call = Call(server, f"http://{host}:{port}")
        assert await call.answered() == b"ok"
        assert b"\r\nHost: %b:%d\r\n" % (host.encode(), port) in server.requests[0]
        call.calls.close()


@pytest.mark.parametrize("is_local", [True, False])
async def test_a_thousand_calls_at_once(tmp_path: Path, is_local: bool) -> None:
    """Each on a connection of its own; a backlog that is full makes callers wait."""
    number = 1000
    old, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 3 * number:
        pytest.skip(f"a process may open {most} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(old, 3 * number), most))
    server, loop = Server(), asyncio.get_running_loop()
    path = str(tmp_path / "engine.sock")
    try:
        async with await (
            loop.create_unix_server(server, path, backlog=16)
            if is_local
            else loop.create_server(server, "127.0.0.1", 0, backlog=LISTEN_BACKLOG)
        ) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            call = Call(server, f"unix:{path}" if is_local else url)
            calling = [call.begin() for _ in range(number)]
            await until(lambda: len(server.requests) == number)
            assert server.num_open == number
            for peer in server.peers:
                peer.write(WHOLE)
            for answer in await asyncio.gather(*calling):
                assert await answer.read() == b"ok"
            assert len(call.calls._resting[call.url]) == number
            call.calls.close()
            await until(lambda: server.num_open == 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (old, most))


async def test_a_connection_that_is_not_there_in_time(tmp_path: Path) -> None:
    """Backlogs are full, and nobody accepts."""
    path, held = str(tmp_path / "engine.sock"), contextlib.ExitStack()
    for family, address in ((socket.AF_UNIX, path), (socket.AF_INET, ("127.0.0.1", 0))):
        listener = held.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen(0)
        bound = listener.getsockname()
        for _ in range(3):
            filler = held.enter_context(socket.socket(family))
            filler.setblocking(False)
            filler.connect_ex(bound)
        url = f"unix:{path}" if family == socket.AF_UNIX else f"http://127.0.0.1:{bound[1]}"
        with pytest.raises(CallError, match=r"no connection within 0\.05 s") as raised:
            await EngineCalls(0.05).call(url, "GET", "/", {}, b"")
        assert raised.value.unheard
    held.close()


async def test_connections_that_take_a_while(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_calls, "_has_come", lambda _: False)
    assert await call.answered(WHOLE) == b"ok"
    with pytest.raises(CallError, match=r"cannot connect.*refused"):
        await call.calls.call("http://127.0.0.1:1", "GET", "/", {}, b"")
