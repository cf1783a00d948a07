"""Streams of engines are read with one timer, and their connections are used again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from pdlaunch.router.engine_errors import EngineFailure
from pdlaunch.router.engine_reader import EngineReader
from tests.router.conftest import Stand
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion, expected_text
from tests.router.test_policy import engine


class Body:
    """Stands for an answer whose bytes come when the test says so."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.content = self
        self.is_closed = False

    async def readany(self) -> bytes:
        return await self.pieces.get()

    def at_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True


class Probe:
    """Finds the engine alive until it is said to be dead."""

    def __init__(self) -> None:
        self.number = 0
        self.is_dead = False

    async def __call__(self) -> None:
        self.number += 1
        if self.is_dead:
            raise EngineFailure(engine("decode-0"), "silent")


def reader(body: Any, probe: Probe) -> EngineReader:
    return EngineReader(engine("decode-0"), body, 0.01, probe)


async def test_silence_is_looked_into_again_and_again_and_bytes_end_it() -> None:
    body, probe = Body(), Probe()
    reading = reader(body, probe)
    task = asyncio.ensure_future(reading.read_some())
    await until(lambda: probe.number >= 3)
    body.pieces.put_nowait(b"x")
    assert await task == b"x"
    probe.is_dead = True
    with pytest.raises(EngineFailure, match="silent"):
        await reading.read_some()
    reading.close()
    assert body.is_closed


async def test_a_reader_that_nobody_waits_for_is_left_alone() -> None:
    body, probe = Body(), Probe()
    reading = reader(body, probe)
    for _ in range(3):
        body.pieces.put_nowait(b"x")
        assert await reading.read_some() == b"x"
        await asyncio.sleep(0.03)  # a slow client: nothing is read meanwhile
    assert probe.number == 0
    reading.close()


async def test_who_cancels_the_task_ends_it_whether_the_engine_is_silent_or_not() -> None:
    body, probe = Body(), Probe()
    reading = reader(body, probe)
    task = asyncio.ensure_future(reading.read_some())
    await until(lambda: reading._waits_since_at is not None)
    # At the same time as the timer.
    reading._waits_since_at = -1.0
    reading._look()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert probe.number == 0
    reading.close()


class CountedEngine(FakeEngine):
    """Knows the connections over which it was asked."""

    def __init__(self) -> None:
        super().__init__("decode-0", "decode")
        self.peers: set[object] = set()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        return await super()._generate(request)


async def test_the_connection_of_a_stream_is_used_again(stand: Stand) -> None:
    """Though the end of the answer comes behind its last event, in a piece of its own."""
    counted = CountedEngine()
    await stand.start([counted])
    for _ in range(3):
        answer = await stand.post(completion(stream=True))
        assert answer.texts() == {0: expected_text("hello", 6)}
        await until(lambda: not stand.state.client._endings)
    assert len(counted.peers) == 1
