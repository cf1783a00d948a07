"""A rank 0 that hangs: it says nothing, and nobody says that it is gone."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.engine.server.engine_service import RANK_SILENCE_S
from pdlaunch.protocol.engine import AddRequest, RequestFinished
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def health(engine: Engine) -> tuple[int, dict]:
    async with engine.session.get(engine.url + "/health") as response:
        return response.status, await response.json()


async def heard(engine: Engine, rank: FakeRank, num_running: int) -> None:
    """Have the rank speak, and the server hear it."""
    await rank.stats(num_running=num_running)
    while engine.service.metrics.engine.stats.num_running != num_running:  # noqa: ASYNC110 - plain state is waited for
        await asyncio.sleep(0)


async def test_a_rank_that_says_nothing_for_too_long_makes_the_engine_unhealthy(
    make_engine, rank: FakeRank, clock: FakeClock
):
    engine: Engine = await make_engine(clock=clock)
    clock.now_s += RANK_SILENCE_S - 1
    assert (await health(engine))[0] == 200
    clock.now_s += 1
    status, answer = await health(engine)
    assert (status, answer["error"]["code"]) == (503, "engine_stalled")
    assert "silent for 30 s" in answer["error"]["message"]
    assert await engine.refusal() == (503, answer["error"])
    assert rank.added() == []


async def test_any_message_of_the_rank_counts_and_what_runs_goes_on(
    make_engine, rank: FakeRank, clock: FakeClock
):
    engine: Engine = await make_engine(clock=clock)
    rank.script = silent
    running = asyncio.create_task(engine.complete(max_tokens=1))
    (request,) = await rank.wait_for(AddRequest)
    clock.now_s += RANK_SILENCE_S - 1
    await heard(engine, rank, num_running=1)
    clock.now_s += RANK_SILENCE_S - 1
    assert (await health(engine))[0] == 200
    clock.now_s += 1
    assert (await health(engine))[0] == 503
    finished = RequestFinished(
        request_id=request.request_id,
        reason="length",
        tokens=[TokenOutput(token_id=rank.ids("x")[0])],
    )
    await rank.say(finished)
    assert (await running)["choices"][0]["text"] == "x"
    assert (await health(engine))[0] == 200
