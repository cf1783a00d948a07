"""An engine that is the only one left: a request waits for it, and finds it when it is back,
whoever notices.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.router.conftest import Stand
from tests.router.fake_engine import FakeEngine, until
from tests.router.fake_generation import expected_tokens, text_of
from tests.router.test_life_of_a_request import completion, expected_text

NEVER_S = 1e6


@pytest.fixture
async def engine(stand: Stand) -> FakeEngine:
    engine = FakeEngine("decode-0", "decode")
    await stand.start([engine], recovery_wait_s=NEVER_S)
    return engine


def patience(stand: Stand, **changes: float) -> None:
    stand.state.recovery = msgspec.structs.replace(stand.state.recovery, **changes)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_turns_requests_away_is_asked_until_it_does_not(
    stand: Stand, engine: FakeEngine, stream: bool
) -> None:
    patience(stand, retry_wait_s=0.001)
    engine.status = 503
    request = asyncio.ensure_future(stand.post(completion(stream=stream)))
    await until(lambda: len(engine.seen) > 2 * stand.state.recovery.max_attempts)
    engine.status = None
    assert (await request).texts() == {0: expected_text("hello", 6)}
    ids = [seen.headers["X-Request-Id"] for seen in engine.seen]
    assert len(ids) == len(set(ids))
    assert stand.metric("pdlaunch_router_retries_total") == len(ids) - 1


async def test_an_engine_that_is_listed_as_ready_again_is_asked_at_once(
    stand: Stand, engine: FakeEngine
) -> None:
    patience(stand, retry_wait_s=NEVER_S)
    engine.status = 503
    request = asyncio.ensure_future(stand.post(completion()))
    await until(lambda: stand.metric("pdlaunch_router_engine_failures_total"))
    engine.status = None
    stand.publish()
    stand.publish(starting=["decode-0"])
    stand.publish()
    assert (await request).texts() == {0: expected_text("hello", 6)}
    assert len(engine.seen) == 2


async def test_a_request_that_breaks_an_engine_is_not_repeated_for_ever(
    stand: Stand, engine: FakeEngine
) -> None:
    patience(stand, retry_wait_s=0.0)
    engine.die_after = 0
    answer = await stand.post(completion())
    assert answer.status == 503
    assert len(engine.seen) == stand.state.recovery.max_attempts


async def test_a_stream_goes_on_at_the_engine_that_broke_it(
    stand: Stand, engine: FakeEngine
) -> None:
    patience(stand, retry_wait_s=0.001)
    stand.die_after(engine, 2, num_told=2)
    request = asyncio.ensure_future(stand.post(completion(stream=True)))
    await until(lambda: stand.metric("pdlaunch_router_engine_failures_total"))
    engine.die_after = None
    assert (await request).texts() == {0: text_of(expected_tokens("hello", 7, 0, 6))}
    assert len(engine.seen[-1].body["resume"]["choices"][0]) >= 2
