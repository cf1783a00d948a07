"""The router uses its connections to engines again."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from pdlaunch.http import engine_calls
from tests.router.conftest import Stand
from tests.router.fake_engine import FakeEngine
from tests.router.test_life_of_a_request import completion, expected_text


class CountedEngine(FakeEngine):
    """Knows the connections over which it was asked."""

    def __init__(self) -> None:
        super().__init__("decode-0", "decode")
        self.peers: set[object] = set()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        return await super()._generate(request)


async def test_the_connection_of_a_stream_is_used_again(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the end of the answer comes behind its last event, in a piece of its own."""
    for name in ("KEEPALIVE_S", "END_S"):  # however busy the machine is
        monkeypatch.setattr(engine_calls, name, 300.0)
    counted = CountedEngine()
    await stand.start([counted])
    for _ in range(3):
        answer = await stand.post(completion(stream=True))
        assert answer.texts() == {0: expected_text("hello", 6)}
        await asyncio.sleep(0.05)
    assert len(counted.peers) == 1
