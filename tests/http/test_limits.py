"""Who is let in, for how long, and with how many bytes; what large inputs hold up."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http import connections, limits
from pdlaunch.http.connections import HttpRunner
from pdlaunch.http.errors import error_response
from pdlaunch.http.limits import (
    SMALL_BODY_BYTES,
    Admission,
    BodyBudget,
    Deadlines,
    LargeInputs,
)

MAX_BYTES = 2 * SMALL_BODY_BYTES


class Server:
    """Answers the length of each body, once ``go`` is set."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget = BodyBudget(budget_bytes, MAX_BYTES)
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

    async def post(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}/"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=io.BytesIO(body), headers=headers) as response,
        ):
            return response.status, await response.json()

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
        while self.budget.held_bytes != num_bytes:  # noqa: ASYNC110 - the budget tells nobody
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(budget_bytes: int = 8 * MAX_BYTES) -> AsyncIterator[Server]:
    server = Server(budget_bytes)
    app = web.Application()
    app.add_routes([web.post("/", server.answer)])
    runner = HttpRunner(app, max_connections=100, shutdown_timeout_s=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


async def test_unfinished_bodies_count_with_their_stated_length() -> None:
    async with serving(4 * MAX_BYTES) as server, server.begun(MAX_BYTES), server.begun(MAX_BYTES):
        async with server.begun(MAX_BYTES):
            await server.holds(3 * MAX_BYTES)
            status, answer = await server.post(b"x" * MAX_BYTES)
            assert (status, answer["error"]["code"]) == (503, "too_many_bytes_in_flight")
            assert str(3 * MAX_BYTES) in answer["error"]["message"]
            assert await server.post(b"x" * SMALL_BODY_BYTES) == (
                200,
                {"length": SMALL_BODY_BYTES},
            )  # small ones find room
        await server.holds(2 * MAX_BYTES)
        assert (await server.post(b"x" * MAX_BYTES))[0] == 200


async def test_a_body_without_a_length_counts_with_what_has_come() -> None:
    async with serving() as server:

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(MAX_BYTES // 65536):
                yield b"x" * 65536

        server.go.clear()
        async with aiohttp.ClientSession() as session:
            post = asyncio.create_task(
                session.post(f"http://127.0.0.1:{server.port}/", data=pieces())
            )
            await server.holds(MAX_BYTES)
            server.go.set()
            assert (await post).status == 200
            (await post).close()


async def test_a_body_that_is_too_long_is_a_413_at_once() -> None:
    async with serving() as server, server.begun(MAX_BYTES + 1) as reader:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")


async def test_a_body_that_falls_silent_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SILENCE_S", 0.1)
    monkeypatch.setattr(connections, "LINGERING_S", 0.1)
    async with serving() as server:
        async with server.begun(100) as reader:
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith(
            "3 bytes of the body came"
        )
        assert server.budget.held_bytes == 0


def leaving() -> OverloadedError:
    return OverloadedError("leaving", status=503, code="leaving")


async def test_a_request_grows_up_to_the_limit_and_gives_all_of_it_back() -> None:
    admission = Admission(3, leaving)
    with admission.admit() as grow:
        grow(3, "n")
        with pytest.raises(OverloadedError, match="3 requests are in flight; at most 3") as full:
            admission.admit().__enter__()
        assert (full.value.status, full.value.code) == (429, "too_many_requests")
    assert admission.in_flight == 0


async def test_what_alone_exceeds_the_limit_is_the_callers_fault() -> None:
    admission = Admission(3, leaving)
    with pytest.raises(RequestError) as error, admission.admit(4):
        pass
    assert not isinstance(error.value, OverloadedError)
    assert (error.value.status, error.value.param) == (400, "prompt")
    assert admission.in_flight == 0


async def test_draining_refuses_newcomers_and_waits_for_the_others() -> None:
    admission = Admission(2, leaving)
    with admission.admit():
        assert not await admission.drain(0.0)
        draining = asyncio.ensure_future(admission.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="leaving"):
            admission.check_open()
        assert not draining.done()
    assert await draining


async def test_a_deadline_covers_all_parts_of_a_request() -> None:
    deadline = Deadlines(0.0, leaving, retry_after_s=7).start()
    for _ in range(2):
        with pytest.raises(OverloadedError, match="within 0 s") as error:
            async with deadline.guard():
                await asyncio.Event().wait()
        assert (error.value.status, error.value.retry_after_s) == (503, 7)
        assert error.value.code == "request_timeout"


async def test_closing_ends_what_runs_and_what_comes() -> None:
    deadlines = Deadlines(60.0, leaving)
    began = asyncio.Event()

    async def run() -> None:
        async with deadlines.start().guard():
            began.set()
            await asyncio.Event().wait()

    running = asyncio.ensure_future(run())
    await began.wait()
    deadlines.close()
    deadlines.close()
    with pytest.raises(OverloadedError, match="leaving"):
        await running
    with pytest.raises(OverloadedError, match="leaving"):
        await run()


async def test_small_inputs_are_worked_at_in_place() -> None:
    assert await LargeInputs().run(False, threading.get_ident) == threading.get_ident()
    assert await LargeInputs().run(True, threading.get_ident) != threading.get_ident()
