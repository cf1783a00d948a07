"""The server of a native engine tells routers what its rank holds, and takes their tokens."""

from __future__ import annotations

from pdlaunch.http.engine_calls import Answer
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, read_feed
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank


async def test_routers_follow_what_the_rank_holds(engine: Engine) -> None:
    engine.service.receive(KVBlocks(block_size=16, stored={"device": [1, 2]}))
    held, numbers = HeldBlocks(), list[int]()
    async with engine.session.get(engine.url + KV_EVENTS_PATH) as answer:
        async for message in read_feed(Answer(answer)):
            held.apply(message)
            numbers.append(len(held))
            if numbers[-1] == 2:
                # A rank that is gone has nothing.
                await engine.service.use_link(None)
            elif 2 in numbers:
                break
    assert numbers[-1] == 0


async def test_tokens_of_the_router_are_not_made_again(engine: Engine, rank: FakeRank) -> None:
    token_ids = [5, 6, 7]
    answer = await engine.complete(prompt="hello world", prompt_token_ids=token_ids)
    assert answer["usage"]["prompt_tokens"] == 3
    assert rank.added()[-1].prompt_token_ids == token_ids
    for wrong in ([], [-1], ["a"], 3, [10**6]):
        body = {"prompt": "hello", "prompt_token_ids": wrong}
        status, _, _ = await engine.post("/v1/completions", body)
        assert status == 400
