"""The stream of what an engine holds: everything first, then changes, over a real connection."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http import kv_feed
from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.kv_feed import KVFeed, read_feed
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks


def stored(*keys: int) -> KVBlocks:
    return KVBlocks(block_size=4, num_blocks=9, stored={"device": list(keys)})


@asynccontextmanager
async def following(feed: KVFeed) -> AsyncIterator[AsyncIterator[KVBlocks]]:
    app = web.Application()
    app.router.add_get("/", feed.send)
    runner, calls = web.AppRunner(app, handler_cancellation=True), EngineCalls()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        answer = await calls.call(url, "GET", "/", {}, b"")
        async with aclosing(read_feed(answer)) as messages:  # type: ignore[type-var]
            yield messages
        answer.close()
    finally:
        await calls.close()
        await runner.cleanup()


async def test_a_stream_begins_with_everything_and_goes_on_with_changes() -> None:
    feed, held = KVFeed(), HeldBlocks()
    feed.publish(stored(1, 2, 3))
    feed.publish(KVBlocks(block_size=4, num_blocks=9, removed={"device": [3]}))
    async with following(feed) as messages:
        for _ in range(2):
            held.apply(await anext(messages))
        assert (held.num_held([1, 2, 3]), held.num_blocks) == (2, 9)
        feed.num_tokens = 80
        feed.publish(stored(3))
        held.apply(await anext(messages))
        assert (held.num_held([1, 2, 3]), held.num_blocks) == (3, 20)
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await anext(messages)


async def test_a_reader_that_is_behind_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_feed, "_MAX_WAITING", 2)
    feed, held = KVFeed(), HeldBlocks()
    async with following(feed) as messages:
        await anext(messages)
        for key in range(4):
            feed.publish(stored(key))
        async for message in messages:
            held.apply(message)
    assert len(held) < 4


async def test_what_is_no_message_ends_the_reading() -> None:
    class Garbage(KVFeed):
        async def send(self, http: web.Request) -> web.StreamResponse:
            return web.Response(body=b"\xff" * 64)

    async with following(Garbage()) as messages:
        with pytest.raises(ProtocolError):
            await anext(messages)


@pytest.mark.parametrize("sizes", [{"block_size": -5}, {"block_size": 2**62}, {"num_blocks": -1}])
async def test_sizes_that_no_cache_has_end_the_reading(sizes: dict[str, int]) -> None:
    feed = KVFeed()
    async with following(feed) as messages:
        await anext(messages)
        feed.publish(KVBlocks(**{"block_size": 4, **sizes}))  # type: ignore[arg-type]
        with pytest.raises(ProtocolError):
            await anext(messages)
