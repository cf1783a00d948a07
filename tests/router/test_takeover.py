"""Prompts that wait at prefill are taken over by an engine that has become free."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pdlaunch.protocol.costs import ROUTE_HEADER
from pdlaunch.router.cost_model import load_of
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import LeastWork, NoIndex, RoutingRequest
from tests.router.conftest import Answer, Stand
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_cost_model import HALF_OPEN, NOW, OPEN, busy, costed, costs
from tests.router.test_cost_routes import costed_pair, forget_times, load_decode
from tests.router.test_early_decode import lend
from tests.router.test_life_of_a_request import completion, expected_text

PROMPT = RoutingRequest(hop="prefill", num_prompt_tokens=512, max_tokens=64)


def taker(*engines: object, request: RoutingRequest = PROMPT, **settings: float) -> str | None:
    prefill = engines[0]
    policy = LeastCost(**settings)
    route = policy.take_over(request, prefill, engines, [], NoIndex(), NOW)  # type: ignore[arg-type]
    return None if route is None else route.name


def test_the_last_prompt_of_a_long_queue_goes_to_a_free_engine() -> None:
    waits = busy("prefill-0", unanswered_tokens=20_000)
    assert taker(waits, busy("decode-0")) == "decode-0"
    assert taker(waits, busy("decode-0", num_streams=60), costed("both-0")) == "both-0"
    assert load_of(waits, NOW) is not None


def test_a_prompt_stays_where_it_is_done_sooner() -> None:
    crowded = busy("decode-0", num_streams=60)
    assert taker(busy("prefill-0", unanswered_tokens=2_000), crowded) is None
    # It is the only one there, so it has begun.
    assert taker(busy("prefill-0", unanswered_tokens=512), busy("decode-0")) is None
    suspect = RoutingRequest(hop="prefill", num_prompt_tokens=512, is_suspect=True)
    waits = busy("prefill-0", unanswered_tokens=20_000)
    assert taker(waits, busy("decode-0"), request=suspect) is None
    assert taker(waits, busy("decode-0", 4), max_itl_s=0.0055) is None
    # Nor does it go back to who has failed it.
    failed, other = busy("decode-0"), busy("decode-1", num_streams=4)
    tried = msgspec.structs.replace(PROMPT, tried=frozenset({failed.key}))
    assert taker(waits, failed, request=tried) is None
    assert taker(waits, failed, other) == "decode-0"
    assert taker(waits, failed, other, request=tried) == "decode-1"
    route = LeastWork().take_over(PROMPT, waits, [waits, busy("decode-0")], [], NoIndex(), NOW)
    assert route is None


def test_nobody_who_is_tried_takes_over_and_nothing_is_taken_from_who_wants_a_pair() -> None:
    waits = busy("prefill-0", unanswered_tokens=20_000)
    for breaker in (HALF_OPEN, OPEN):
        assert taker(waits, costed("decode-0", breaker=breaker)) is None
    wants_pair = msgspec.structs.replace(PROMPT, wants_pair=True)
    assert taker(waits, busy("decode-0"), request=wants_pair) is None
    assert taker(waits, busy("decode-0"), prefers_pairs=True) is None


async def hold_one(stand: Stand, prefill: FakeEngine, decode: FakeEngine) -> asyncio.Task[Answer]:
    """Let a prompt wait at prefill, then free the decode engine."""
    prefill.hold_prefill = True
    await stand.start(lend([prefill, decode]))
    load_decode(stand)
    (queue,) = [engine for engine in stand.pool.engines if engine.role == "prefill"]
    posting = asyncio.ensure_future(stand.post(completion(stream=True)))
    await prefill.holding.wait()
    queue.unanswered_tokens += 50_000
    queue.progressed_at = stand.pool.clock()
    load_decode(stand, 0)
    return posting


@pytest.mark.parametrize("begins", [True, False], ids=["first token", "end"])
async def test_a_prompt_is_taken_over_when_another_request_gets_on(
    stand: Stand, begins: bool
) -> None:
    """A stream begins or ends at decode, which has time for the prompt that waits then."""
    prefill, decode = costed_pair()
    prefill.hold_prefill, decode.hold_after = True, 0 if begins else 1
    await stand.start([prefill, decode])
    (queue,) = [engine for engine in stand.pool.engines if engine.role == "prefill"]
    streaming = asyncio.ensure_future(stand.post(completion(stream=True)))
    await decode.holding.wait()
    if not begins:
        await until(lambda: stand.metric("pdlaunch_router_generation_tokens_total") == 1)
        forget_times(stand)
    load_decode(stand)
    posting = asyncio.ensure_future(stand.post(completion(prompt="other")))
    await prefill.holding.wait()
    queue.unanswered_tokens += 50_000
    queue.progressed_at = stand.pool.clock()
    load_decode(stand, 1)
    assert not prefill.asked_back
    held, decode.go = decode.go, asyncio.Event()
    # After its first token it is held again: it has not ended when the prompt is asked for.
    decode.hold_after = 1 if begins else None
    held.set()
    await until(lambda: prefill.asked_back)
    decode.go.set()
    assert (await streaming).texts() == {0: expected_text("hello", 6)}
    assert (await posting).headers[ROUTE_HEADER].startswith("decode-0; kind=decode")
    assert stand.metric('pdlaunch_router_takeovers_total{outcome="taken"}') == 1


async def test_the_last_of_each_queue_is_asked_for_by_one_at_a_time(stand: Stand) -> None:
    prefills = [FakeEngine(f"prefill-{number}", "prefill") for number in range(2)]
    decode = FakeEngine("decode-0", "decode")
    for engine in (*prefills, decode):
        engine.costs = costs(engine.role)
        engine.hold_prefill = True
        engine.gives_back = False
    await stand.start([*prefills, decode])
    load_decode(stand)
    posting = []
    for number in range(4):
        posting.append(asyncio.ensure_future(stand.post(completion(prompt=f"prompt {number}"))))
        await until(lambda: sum(len(one.seen) for one in prefills) == len(posting))
    assert [len(one.seen) for one in prefills] == [2, 2]
    for view in stand.pool.engines:
        if view.role == "prefill":
            view.unanswered_tokens += 50_000
            view.progressed_at = stand.pool.clock()
    load_decode(stand, 0)
    last = {one.seen[-1].headers["X-Request-Id"] for one in prefills}
    for _ in range(3):
        stand.state.waiting.consider()
    await stand.state.settled()
    asked_back = [name for one in prefills for name in one.asked_back]
    assert len(asked_back) == 1
    assert set(asked_back) < last
    for one in prefills:
        one.go.set()
    for number, answer in enumerate(await asyncio.gather(*posting)):
        assert answer.texts() == {0: expected_text(f"prompt {number}", 6)}


async def test_decode_answers_what_prefill_gives_back(stand: Stand) -> None:
    prefill, decode = costed_pair()
    posting = await hold_one(stand, prefill, decode)
    stand.state.waiting.consider()
    answer = await posting
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert answer.headers[ROUTE_HEADER].startswith("decode-0; kind=decode")
    assert prefill.asked_back == [prefill.seen[0].headers["X-Request-Id"]]
    assert "kv_transfer_params" not in decode.seen[-1].body
    assert stand.metric('pdlaunch_router_takeovers_total{outcome="taken"}') == 1
    for name in ("engine_failures", "retries", "fallbacks"):
        assert stand.metric(f"pdlaunch_router_{name}_total") == 0
    (queue,) = [engine for engine in stand.pool.engines if engine.role == "prefill"]
    assert queue.breaker.num_failures == 0


async def test_a_prompt_that_has_begun_is_answered_as_ever(stand: Stand) -> None:
    prefill, decode = costed_pair()
    prefill.gives_back = False
    posting = await hold_one(stand, prefill, decode)
    stand.state.waiting.consider()
    answer = await posting
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert answer.headers[ROUTE_HEADER].startswith("prefill-0->decode-0; kind=pair")
    assert len(prefill.asked_back) == 1
    assert stand.metric('pdlaunch_router_takeovers_total{outcome="asked"}') == 1
    assert stand.metric('pdlaunch_router_takeovers_total{outcome="taken"}') == 0


@pytest.mark.parametrize("status", [503, 429])
async def test_a_taker_that_fails_leaves_it_to_others(stand: Stand, status: int) -> None:
    prefill, decode = costed_pair()
    posting = await hold_one(stand, prefill, decode)
    stand.state.waiting.consider()
    decode.status = status
    answer = await posting
    assert answer.texts() == {0: expected_text("hello", 6)}


async def test_it_is_asked_once_and_nobody_asks_after_the_first_token(stand: Stand) -> None:
    prefill, decode = costed_pair()
    prefill.gives_back = False
    posting = await hold_one(stand, prefill, decode)
    for _ in range(5):
        stand.state.waiting.consider()
    await posting
    stand.state.waiting.consider()
    await stand.state.settled()
    assert len(prefill.asked_back) == 1
