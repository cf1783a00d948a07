"""Calls of a server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pdlaunch.http import engine_connection
from tests.http.engine_calls.server import Call, Server


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
