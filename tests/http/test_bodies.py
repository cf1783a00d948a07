from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http import bodies, connections
from pdlaunch.http.bodies import SMALL_BODY_BYTES, BodyBudget, max_engine_body_bytes, read_body
from pdlaunch.http.connections import LINGERING_S, HttpRunner
from pdlaunch.http.errors import error_response

MAX_BYTES = 2 * SMALL_BODY_BYTES


class Server:
    """Answers the length of each body, once ``go`` is set."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget = BodyBudget(budget_bytes)
        self.go = asyncio.Event()
        self.go.set()
        self.port = 0

    async def answer(self, http: web.Request) -> web.Response:
        try:
            with self.budget.hold() as hold:
                body = await read_body(http, hold, max_bytes=MAX_BYTES)
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


async def test_a_body_is_read_and_its_room_is_free_again() -> None:
    async with serving() as server:
        assert await server.post(b"x" * MAX_BYTES) == (200, {"length": MAX_BYTES})
        assert server.budget.held_bytes == 0


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


async def test_a_compressed_body_counts_with_its_decompressed_length() -> None:
    async with serving(2 * MAX_BYTES) as server:
        fits, bomb = b"x" * MAX_BYTES, b"x" * (MAX_BYTES + 1)
        assert await server.post(gzip.compress(fits), **{"Content-Encoding": "gzip"}) == (
            200,
            {"length": MAX_BYTES},
        )
        status, answer = await server.post(gzip.compress(bomb), **{"Content-Encoding": "gzip"})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert str(MAX_BYTES) in answer["error"]["message"]
        with server.budget.hold(MAX_BYTES):  # now there is no room for what it comes to
            status, answer = await server.post(gzip.compress(fits), **{"Content-Encoding": "gzip"})
        assert (status, answer["error"]["code"]) == (503, "too_many_bytes_in_flight")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_broken_compression_is_a_400(encoding: str) -> None:
    text = bytes(range(256)) * 4
    whole = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)
    async with serving() as server:
        assert await server.post(whole, **{"Content-Encoding": encoding}) == (200, {"length": 1024})
        for broken in (
            b"{}",
            whole[:-1],
            whole[:30],
            whole[:30] + b"\xff\xff" + whole[32:],
            whole + b"more",
        ):
            status, answer = await server.post(broken, **{"Content-Encoding": encoding})
            assert (status, answer["error"]["code"]) == (400, "invalid_body")


async def test_an_encoding_that_is_not_known_is_a_415() -> None:
    async with serving() as server:
        status, answer = await server.post(b"{}", **{"Content-Encoding": "br"})
        assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")
        assert await server.post(b"{}", **{"Content-Encoding": "identity"}) == (200, {"length": 2})


async def test_deflate_without_the_header_of_zlib_is_read_as_browsers_do() -> None:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    async with serving() as server:
        raw = compressor.compress(b"x" * 1000) + compressor.flush()
        assert await server.post(raw, **{"Content-Encoding": "deflate"}) == (200, {"length": 1000})


async def test_a_body_that_is_too_long_is_a_413_at_once() -> None:
    async with serving() as server, server.begun(MAX_BYTES + 1) as reader:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")


async def test_a_body_that_falls_silent_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SILENCE_S", 0.1)
    monkeypatch.setattr(connections, "LINGERING_S", 0.1)
    async with serving() as server:
        async with server.begun(100) as reader:
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith(
            "3 bytes of the body came"
        )
        assert server.budget.held_bytes == 0


def test_silent_bodies_end_within_30_s() -> None:
    assert bodies.BODY_SILENCE_S + LINGERING_S <= 30


async def test_a_refused_body_leaves_no_trace_in_the_budget() -> None:
    budget = BodyBudget(1000)
    with budget.hold(700):
        with pytest.raises(OverloadedError), budget.hold(400):
            pass
        assert budget.held_bytes == 700
    assert budget.held_bytes == 0


def test_an_engine_takes_what_a_router_makes_of_the_longest_body() -> None:
    """A request of many choices goes on elsewhere near its end: all of its tokens are sent with
    it.
    """
    num_choices, max_model_len = 128, 500
    tokens = [{"token_id": 2**31 - 1}] * max_model_len
    tokens_of_all = {"choices": [tokens] * num_choices, "sent": True}
    parameters = {
        "remote_block_ids": list(range(max_model_len)),
        "first_tokens": [[0.123456789] * 20] * num_choices,
    }
    added = len(
        json.dumps(
            {"resume": tokens_of_all, "kv_transfer_params": parameters}, separators=(",", ":")
        )
    )
    assert 1000 + added <= max_engine_body_bytes(1000, max_model_len)


def test_the_budget_is_eight_of_the_longest_bodies_unless_set() -> None:
    assert LimitSettings().body_budget_bytes == 128 * 1024**2
    assert LimitSettings(max_body_bytes=1000).body_budget_bytes == 8000
    assert (
        LimitSettings(max_body_bytes=1000, max_body_bytes_in_flight=2000).body_budget_bytes == 2000
    )
    with pytest.raises(ValueError, match="at least twice max_body_bytes, which is 1000"):
        LimitSettings(max_body_bytes=1000, max_body_bytes_in_flight=1999)
