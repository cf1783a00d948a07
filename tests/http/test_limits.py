"""Who is let in, for how long, and with how many bytes; what large inputs hold up."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http import connections, limits
from pdlaunch.http.connections import HttpRunner
from pdlaunch.http.errors import error_response
from pdlaunch.http.limits import SMALL_BODY_BYTES, Admission, BodyBudget, Deadlines, work_at_input
from tests.router.fake_engine import until

MAX_BYTES = 2 * SMALL_BODY_BYTES


class Server:
    """Answers the length of each body, once ``go`` is set."""

    def __init__(self) -> None:
        self.budget = BodyBudget(4 * MAX_BYTES, MAX_BYTES)
        self.go = asyncio.Event()
        self.go.set()
        self.port = 0

    async def answer(self, http: web.Request) -> web.Response:
        try:
            async with self.budget.read(http) as body:
                await self.go.wait()
                return web.json_response({"length": len(body)})
        except RequestError as error:
            return error_response(error)

    async def post(self, num_bytes: int, *, is_chunked: bool = False) -> tuple[int, int | str]:
        """Send a body of this length; return the status, and its length or the error's code."""

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(num_bytes // 65536):
                yield b"x" * 65536

        data = pieces() if is_chunked else b"x" * num_bytes
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{self.port}/", data=data) as response,
        ):
            answer = await response.json()
            return response.status, answer["length"] if response.ok else answer["error"]["code"]

    @contextlib.asynccontextmanager
    async def begun(self, length: int) -> AsyncIterator[asyncio.StreamReader]:
        """A body of which only the beginning is sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\nxxx" % length)
        try:
            yield reader
        finally:
            writer.close()
            await writer.wait_closed()

    async def holds(self, num_bytes: int) -> None:
        await until(lambda: self.budget.held_bytes == num_bytes)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.add_routes([web.post("/", server.answer)])
    runner = HttpRunner(app, max_connections=100, shutdown_timeout_s=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    yield server
    await runner.cleanup()


async def test_unfinished_bodies_count_with_their_stated_length(server: Server) -> None:
    async with server.begun(MAX_BYTES), server.begun(MAX_BYTES):
        async with server.begun(MAX_BYTES):
            await server.holds(3 * MAX_BYTES)
            assert await server.post(MAX_BYTES) == (503, "too_many_bytes_in_flight")
            # Small ones find room.
            assert await server.post(SMALL_BODY_BYTES) == (200, SMALL_BODY_BYTES)
        await server.holds(2 * MAX_BYTES)
        assert await server.post(MAX_BYTES) == (200, MAX_BYTES)


async def test_a_body_without_a_length_counts_with_what_has_come(server: Server) -> None:
    assert await server.post(MAX_BYTES + 65536, is_chunked=True) == (413, "body_too_large")
    server.go.clear()
    post = asyncio.create_task(server.post(MAX_BYTES, is_chunked=True))
    await server.holds(MAX_BYTES)
    server.go.set()
    assert await post == (200, MAX_BYTES)
    await server.holds(0)


async def test_a_body_that_is_too_long_is_a_413_at_once(server: Server) -> None:
    async with server.begun(MAX_BYTES + 1) as reader:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")


async def test_a_body_that_falls_silent_is_a_408(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_SILENCE_S", 0.1)
    monkeypatch.setattr(connections, "LINGERING_S", 0.1)
    async with server.begun(100) as reader:
        head, _, body = (await reader.readuntil(b"}}")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["message"].startswith("only 3 bytes of the body arrived")
    await server.holds(0)


async def test_a_request_grows_up_to_the_limit_and_gives_all_of_it_back() -> None:
    admission = Admission(3, AssertionError)
    with admission.admit() as grow:
        grow(3, "n")
        with pytest.raises(OverloadedError, match="at most 3") as full:
            admission.admit().__enter__()
        assert (full.value.status, full.value.code) == (429, "too_many_requests")
    # What alone exceeds the limit is the caller's fault.
    with pytest.raises(RequestError) as error, admission.admit(4):
        pass
    assert (error.value.status, error.value.param) == (400, "prompt")
    assert admission.in_flight == 0


async def test_nothing_begins_once_all_was_ended() -> None:
    deadlines = Deadlines(60.0, lambda: OverloadedError("leaving"))
    begin = deadlines.start()
    deadlines.close()
    with pytest.raises(OverloadedError, match="leaving"):
        begin()


async def test_small_inputs_are_worked_at_in_place() -> None:
    assert await work_at_input(False, threading.get_ident) == threading.get_ident()
    assert await work_at_input(True, threading.get_ident) != threading.get_ident()
