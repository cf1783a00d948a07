"""Connections to engines: those that close under a call, are cancelled, refused or slow."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.http import engine_calls
from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.engine_connection import (
    HIGH_WATER_BYTES,
    CallError,
)
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG
from tests.http.engine_calls.server import CHUNKED, OK, WHOLE, Call, Server
from tests.router.fake_engine import until


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


async def test_a_body_that_is_too_long_is_an_error(call: Call) -> None:
    async def ask(answer: bytes) -> tuple[int, bytes]:
        call.server.says = answer
        return await call.calls.ask(call.url, "GET", "/", {}, timeout_s=60.0, max_bytes=3)

    assert await ask(OK + b"Content-Length: 3\r\n\r\n123") == (200, b"123")
    with pytest.raises(CallError, match="more than 3 bytes"):
        await ask(OK + b"Content-Length: 4\r\n\r\n1234")
    with pytest.raises(CallError, match="more than 3 bytes"):
        await ask(CHUNKED + b"4\r\n1234\r\n")  # it goes on, and is not waited for
    await until(lambda: call.server.num_open == 0)


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


async def test_a_name_is_resolved_once_for_all_who_connect_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, loop, names = Server(), asyncio.get_running_loop(), list[str]()
    server.says = WHOLE
    resolve = socket.getaddrinfo

    def counted(host: str, *arguments: Any, **options: Any) -> Any:
        names.append(host)
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    async with await loop.create_server(server, "127.0.0.1", 0) as listening:
        call = Call(server, f"http://localhost:{listening.sockets[0].getsockname()[1]}")
        for answer in await asyncio.gather(*(call.begin() for _ in range(20))):
            assert await answer.read() == b"ok"
        assert server.num_open == 20
        assert names == ["localhost"]
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
