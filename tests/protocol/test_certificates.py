"""The certificate of a launch: engines prove that they hold its key, before anything is sent."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pdlaunch.protocol.certificates import client_context, new_certificate, server_context
from pdlaunch.protocol.sockets import new_launch_keys

CERTIFICATE, OTHER = new_certificate(), new_certificate()


@contextlib.asynccontextmanager
async def engine(tls: ssl.SSLContext | None, seen: list[str]) -> AsyncIterator[int]:
    """A server that notes the keys that it is sent."""

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(scheme: str, port: int) -> int:
    headers = {"Authorization": "Bearer launch-token"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{scheme}://127.0.0.1:{port}/", ssl=client_context(CERTIFICATE)) as response,
    ):
        return response.status


async def test_engine_of_the_launch_gets_its_token():
    seen: list[str] = []
    async with engine(server_context(CERTIFICATE), seen) as port:
        assert await ask("https", port) == 200
        with pytest.raises(aiohttp.ClientError):
            await ask("http", port)
    assert seen == ["Bearer launch-token"]


@pytest.mark.parametrize("tls", [server_context(OTHER), None], ids=["other key", "no TLS"])
async def test_engine_of_nobody_is_sent_nothing(tls: ssl.SSLContext | None):
    """Whoever has taken an engine's address gets no token and no prompt."""
    seen: list[str] = []
    async with engine(tls, seen) as port:
        with pytest.raises(aiohttp.ClientError):
            await ask("https", port)
    assert seen == []


def test_key_leaves_no_file_and_no_text():
    before = set(Path("/proc/self/fd").iterdir())
    server_context(CERTIFICATE)
    assert set(Path("/proc/self/fd").iterdir()) <= before
    assert "PRIVATE" not in repr(new_launch_keys(with_certificate=True))
    assert new_launch_keys().certificate is None
