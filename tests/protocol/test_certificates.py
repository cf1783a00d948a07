"""The certificate of a launch: engines prove that they hold its key, before anything is sent to
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from pdlaunch.http.connections import HttpRunner
from pdlaunch.protocol.certificates import client_context, new_certificate, server_context
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts, keys_of_launch
from pdlaunch.router.engine_errors import EngineFailure

CERTIFICATE, OTHER = new_certificate(), new_certificate()


@contextlib.asynccontextmanager
async def engine(tls: ssl.SSLContext | None, seen: list[str]) -> AsyncIterator[int]:
    """An engine's server, as engines run theirs; it notes the keys that it is sent."""

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        await request.read()
        return web.json_response({"object": "list", "data": []})

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    app.router.add_post("/v1/completions", answer)
    runner = HttpRunner(app, max_connections=2, shutdown_timeout_s=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(scheme: str, port: int) -> bytes:
    """What the launch's router gets out of an engine."""
    url = f"{scheme}://127.0.0.1:{port}"
    target = Engine(
        name="e",
        processes=(1,),
        url=url,
        role=None,
        capabilities=Capabilities(),
        ready=True,
        state="ready",
    )
    tls = client_context(CERTIFICATE)
    client = EngineClient(keys_of_launch("launch-token", None), EngineTimeouts(), tls)
    try:
        return (await client.ask(target, "/v1/completions", b"{}", {})).body
    finally:
        await client.close()


async def test_engine_of_the_launch_gets_its_token():
    seen: list[str] = []
    async with engine(server_context(CERTIFICATE), seen) as port:
        assert b'"list"' in await ask("https", port)
    assert seen == ["Bearer launch-token"]


async def test_engine_of_nobody_is_sent_nothing():
    """Whoever has taken an engine's address has a key of his own, and gets no token and no
    prompt.
    """
    seen: list[str] = []
    async with engine(server_context(OTHER), seen) as port:
        with pytest.raises(EngineFailure, match="certificate verify failed"):
            await ask("https", port)
    async with engine(None, seen) as port:
        with pytest.raises(EngineFailure):
            await ask("https", port)
    assert seen == []


async def test_engine_takes_no_plain_requests():
    seen: list[str] = []
    async with engine(server_context(CERTIFICATE), seen) as port:
        with pytest.raises(EngineFailure):
            await ask("http", port)
    assert seen == []


async def test_connections_beyond_the_cap_are_told_so_over_tls():
    async with engine(server_context(CERTIFICATE), []) as port:
        busy = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_context(CERTIFICATE)
            )
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            busy.append((reader, writer))
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context(CERTIFICATE)
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        for _, each in [*busy, (reader, writer)]:
            each.transport.abort()


def test_key_leaves_no_file_and_no_text():
    before = set(Path("/proc/self/fd").iterdir())
    server_context(CERTIFICATE)
    assert set(Path("/proc/self/fd").iterdir()) <= before
    assert "PRIVATE" not in repr(new_launch_keys(with_certificate=True))


def test_launches_of_one_host_have_none():
    assert new_launch_keys().certificate is None
