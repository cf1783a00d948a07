"""Between the server and its rank 0: what is passed on, a rank that is lost, and one that hangs."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pdlaunch.engine.server.engine_service import RANK_SILENCE_S
from pdlaunch.http.engine_calls import Answer
from pdlaunch.http.headers import ORIGIN_HEADER
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, read_feed
from pdlaunch.protocol.engine import AddRequest, CheckIntegrity, EngineStats, RequestFinished
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent


async def test_a_rank_that_dies_while_it_proves_its_blocks_is_503(engine: Engine, rank: FakeRank):
    rank.checks_integrity = False
    asking = asyncio.create_task(engine.get("/pdlaunch/integrity"))
    await rank.wait_for(CheckIntegrity)
    await engine.service.use_link(None)
    status, body = await asking
    assert (status, body["error"]["code"]) == (503, "engine_starting")


async def test_a_new_rank_fails_the_requests_of_the_old_one(engine: Engine, rank: FakeRank):
    rank.script = silent
    post = asyncio.create_task(engine.refusal())
    await rank.wait_for(AddRequest)
    await engine.service.use_link(None)
    status, error = await post
    assert (status, error["code"]) == (503, "engine_restarting")
    status, error = await engine.refusal()
    assert (status, error["code"]) == (503, "engine_starting")
    assert (await engine.get("/health"))[0] == 503


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({ORIGIN_HEADER: "77"}, (77, False)),
        ({ORIGIN_HEADER: "77;suspect"}, (77, True)),
        ({}, (0, False)),
    ],
)
async def test_all_choices_have_the_origin_of_their_prompt(
    engine: Engine, rank: FakeRank, headers, expected
):
    await engine.post("/v1/completions", {"prompt": "hello", "max_tokens": 1, "n": 2}, **headers)
    assert [(request.origin, request.is_suspect) for request in rank.added()] == [expected] * 2


async def test_a_burst_of_messages_loses_none(make_engine: Callable[..., Any]):
    """ZMQ's default would drop what a slow server has not read."""
    engine: Engine = await make_engine(max_model_len=20_000)
    answer = await engine.complete(max_tokens=15_000)
    assert answer["usage"]["completion_tokens"] == 15_000


async def test_a_rank_that_says_nothing_for_too_long_makes_the_engine_unhealthy(
    make_engine: Callable[..., Any], rank: FakeRank
):
    """It hangs, and nobody says that it is gone."""
    now_s = 1000.0
    engine: Engine = await make_engine(clock=lambda: now_s)
    rank.script = silent
    running = asyncio.create_task(engine.complete(max_tokens=1))
    (request,) = await rank.wait_for(AddRequest)
    now_s += RANK_SILENCE_S - 1
    # Any message counts.
    await rank.send(EngineStats(num_running=1))
    while engine.service.metrics.stats.num_running != 1:  # noqa: ASYNC110 - plain state is waited for
        await asyncio.sleep(0)
    now_s += RANK_SILENCE_S - 1
    assert (await engine.get("/health"))[0] == 200
    now_s += 1
    status, answer = await engine.get("/health")
    assert (status, answer["error"]["code"]) == (503, "engine_stalled")
    assert "silent for 30 s" in answer["error"]["message"]
    assert await engine.refusal() == (503, answer["error"])
    assert len(rank.added()) == 1
    # What runs goes on.
    token = TokenOutput(token_id=rank.ids("x")[0])
    await rank.say(RequestFinished(request_id=request.request_id, reason="length", tokens=[token]))
    assert (await running)["choices"][0]["text"] == "x"
    assert (await engine.get("/health"))[0] == 200


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
