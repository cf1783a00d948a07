"""A router in front of engines that fail or are slow, and are well again later."""

from __future__ import annotations

import asyncio
import re

import msgspec
import pytest

from pdlaunch.observe.spans import PULL, Span, SpanReport
from pdlaunch.protocol.costs import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.router.breaker import OPEN_S
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineAnswer, EngineClient
from pdlaunch.router.pace import NUM_SAMPLES, SLOW_TRY_S
from pdlaunch.router.prefill_hop import MAX_RETRY_AFTER_S
from tests.http.loop_clock import pass_time
from tests.router.conftest import SPEC, Stand, pairs
from tests.router.fake_engine import FakeEngine
from tests.router.fake_vllm_engine import FakeVllmEngine, proof
from tests.router.test_cost_model import costs
from tests.router.test_cost_routes import costed_pair, forget_times, load_prefill
from tests.router.test_life_of_a_request import completion, expected_text


class Clock:
    """Stands still; the pool's clock from here on."""

    def __init__(self, stand: Stand) -> None:
        self.now_s = stand.pool.clock()
        stand.pool.clock = self

    def __call__(self) -> float:
        return self.now_s


def decodes(number: int) -> list[FakeEngine]:
    engines = [FakeEngine(f"decode-{index}", "decode") for index in range(number)]
    for engine in engines:
        engine.costs = costs("decode")
    return engines


def named(stand: Stand, name: str) -> Engine:
    return next(engine for engine in stand.pool.engines if engine.name == name)


async def status_of(stand: Stand, name: str) -> dict[str, object]:
    async with stand.session.get("/pdlaunch/status") as response:
        engines = (await response.json())["engines"]
    return next(engine for engine in engines if engine["name"] == name)


async def shown(stand: Stand, gauge: str, **labels: str) -> str:
    """Return the one state that a gauge shows."""
    async with stand.session.get("/metrics") as response:
        page = await response.text()
    names = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    found = re.findall(
        rf'^pdlaunch_router_{gauge}{{{names},state="(\w+)"}} 1\.0$', page, re.MULTILINE
    )
    (state,) = found
    return str(state)


@pytest.mark.parametrize("with_costs", [True, False])
async def test_who_fails_gets_one_try_at_a_time_until_it_is_well(
    stand: Stand, with_costs: bool
) -> None:
    engines = decodes(2)
    if not with_costs:
        for engine in engines:
            engine.costs = None
    await stand.start(engines)
    clock, sick = Clock(stand), engines[1]
    sick.status = 500

    async def ask(number: int) -> None:
        for _ in range(number):
            answer = await stand.post(completion(stream=True))
            assert answer.texts() == {0: expected_text("hello", 6)}

    await ask(4)
    assert len(sick.seen) == 1
    assert (await status_of(stand, "decode-1"))["health"] == "open"
    assert await shown(stand, "engine_health", engine="decode-1") == "open"
    answer = await stand.post(completion())
    assert 'left_out="decode-1: open after 1 failures' in answer.headers[ROUTE_HEADER]
    # A try that fails is made up for by the other engine, and the next one comes later.
    clock.now_s += OPEN_S
    assert (await status_of(stand, "decode-1"))["health"] == "half_open"
    assert await shown(stand, "engine_health", engine="decode-1") == "half_open"
    await ask(4)
    assert len(sick.seen) == 2
    assert stand.metric('pdlaunch_router_tries_total{engine="decode-1"}') == 1
    clock.now_s += OPEN_S
    await ask(2)
    assert len(sick.seen) == 2
    sick.status = None
    clock.now_s += OPEN_S
    await ask(1)
    assert len(sick.seen) == 3
    assert (await status_of(stand, "decode-1"))["health"] == "closed"
    assert "left_out" not in (await stand.post(completion())).headers[ROUTE_HEADER]
    assert await shown(stand, "engine_health", engine="decode-1") == "closed"


async def test_failed_tries_use_up_no_attempt(stand: Stand) -> None:
    """Three engines are half-open and fail again; the fourth answers the same request."""
    engines = decodes(5)
    await stand.start(engines)
    clock = Clock(stand)
    for engine in engines[1:]:
        engine.status = 500
        stand.pool.failed(named(stand, engine.name))
    clock.now_s += OPEN_S
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert [len(engine.seen) for engine in engines] == [1, 1, 1, 1, 1]


async def test_when_all_are_open_the_least_bad_one_serves(stand: Stand) -> None:
    engines = decodes(2)
    await stand.start(engines)
    Clock(stand)
    bad, worse = named(stand, "decode-0"), named(stand, "decode-1")
    stand.pool.failed(bad)
    stand.pool.failed(worse)
    worse.breaker.num_failures += 1
    for _ in range(3):
        assert (await stand.post(completion())).status == 200
    assert (len(engines[0].seen), len(engines[1].seen)) == (3, 0)


async def test_a_slow_engine_loses_its_traffic_until_it_is_fast(stand: Stand) -> None:
    """Its tokens are held back while the other engine's come at once."""
    engines = decodes(2)
    await stand.start(engines)
    clock = Clock(stand)
    slow, fast = named(stand, "decode-1"), named(stand, "decode-0")
    for _ in range(NUM_SAMPLES):
        fast.told(20, 0.1, clock())
        slow.told(20, 1.0, clock())
    for _ in range(5):
        assert (await stand.post(completion())).status == 200
    # One of them was its try.
    assert (len(engines[0].seen), len(engines[1].seen)) == (4, 1)
    told = await status_of(stand, "decode-1")
    assert (told["health"], told["times_slower"]) == ("slow", 10.0)
    assert told["left_out"] == "10.0 times slower than its peers"
    for number in range(2, 6):
        clock.now_s += SLOW_TRY_S
        # Streams of this length tell how fast it is: as fast as the other one.
        answer = await stand.post(completion(stream=True, max_tokens=30))
        assert answer.status == 200
        assert len(engines[1].seen) == number
        if (await status_of(stand, "decode-1"))["health"] == "closed":
            break
        fast.told(20, 0.1, clock())
    for _ in range(4):
        forget_times(stand)
        await stand.post(completion())
    assert (await status_of(stand, "decode-1"))["left_out"] == ""
    assert len(engines[1].seen) > number


async def test_what_engines_take_is_measured_without_slow_clients(stand: Stand) -> None:
    (engine,) = decodes(1)
    await stand.start([engine])
    await stand.post(completion(stream=True, max_tokens=30))
    pace = named(stand, "decode-0").pace
    assert (pace.first_token.num_samples, pace.gap.num_samples) == (1, 1)
    await stand.post(completion(stream=True, max_tokens=3))
    assert (pace.first_token.num_samples, pace.gap.num_samples) == (2, 1)


async def test_a_slow_engine_of_vllm_is_found_by_answers_that_come_whole(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 40 tokens; the ones of 3 tell more of their pulls."""
    leases: dict[str, list[int]] = {}
    prefill = FakeVllmEngine("prefill-0", "prefill", leases)
    engines = [FakeVllmEngine(f"decode-{index}", "decode", leases) for index in range(2)]
    for engine in engines:
        engine.script = engine.script * 10
    stand.pairs = [proof(prefill, engine) for engine in engines]
    await stand.start([prefill, *engines])
    clock, ask = Clock(stand), EngineClient.ask

    async def timed_ask(client: EngineClient, engine: Engine, *given: object) -> EngineAnswer:
        clock.now_s += 4.0 if engine.name == "decode-1" else 0.4
        return await ask(client, engine, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(EngineClient, "ask", timed_ask)
    for max_tokens in (3, 40):
        for _ in range(2 * NUM_SAMPLES):
            forget_times(stand)
            assert (await stand.post(completion(prompt="x|", max_tokens=max_tokens))).status == 200
        paces = [named(stand, engine.name).pace.gap for engine in engines]
        assert [pace.num_samples for pace in paces] == [0 if max_tokens == 3 else NUM_SAMPLES] * 2
    assert (await status_of(stand, "decode-1"))["times_slower"] == 10.0


async def test_pulls_that_fail_leave_out_the_pair_and_no_engine(stand: Stand) -> None:
    """Decode computes the prompts itself, as engines do, and tells so in its spans."""
    engines = pairs(1)
    await stand.start(engines)
    clock, decode = Clock(stand), engines[1]
    span = Span(PULL, 0.0, 0.1, {"error": "no such peer"})
    decode.report = msgspec.to_builtins(SpanReport(elapsed_s=0.2, spans=[span]))
    for pulls in (1, 1, 1):
        assert (await stand.post(completion(stream=True))).status == 200
        asked = [seen for seen in decode.seen if "kv_transfer_params" in seen.body]
        assert len(asked) == pulls
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "open"}
    assert await shown(stand, "pair_health", prefill="prefill-0", decode="decode-0") == "open"
    assert stand.pool.health().left_out == {}
    decode.report = None
    clock.now_s += OPEN_S
    assert (await stand.post(completion(stream=True))).status == 200
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "closed"}


async def test_engines_that_refuse_a_pull_are_not_blamed(stand: Stand) -> None:
    leases: dict[str, list[int]] = {}
    prefill = FakeVllmEngine("prefill-0", "prefill", leases)
    decode = FakeVllmEngine("decode-0", "decode", leases)
    stand.pairs = [proof(prefill, decode)]
    await stand.start([prefill, decode])
    Clock(stand)
    decode.status = 500
    await stand.post(completion(prompt="x|", stream=True))
    assert named(stand, "decode-0").breaker.state(stand.pool.clock()) == "closed"
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "open"}
    async with stand.session.get("/pdlaunch/status") as response:
        (pair,) = (await response.json())["pairs"]
    assert pair["health"] == "open"


async def test_a_question_about_tokens_is_no_try(stand: Stand) -> None:
    """It would be answered whether the engine computes or not."""
    engines = decodes(2)
    await stand.start(engines)
    clock = Clock(stand)
    failed = named(stand, "decode-1")
    stand.pool.failed(failed)
    clock.now_s += OPEN_S
    assert stand.pool.health().wants_try == {"decode-1"}
    for _ in range(2):
        answer = await stand.post({"model": "tiny", "prompt": "hello"}, path="/tokenize")
        assert answer.status == 200
    assert stand.pool.health().wants_try == {"decode-1"}
    assert (await stand.post(completion())).status == 200
    assert [len(engine.seen) for engine in engines] == [0, 1]
    assert failed.breaker.state(clock()) == "closed"
    # Where no other engine is left, it answers.
    stand.pool.failed(failed)
    stand.publish(without=["decode-0"])
    answer = await stand.post({"model": "tiny", "prompt": "hello"}, path="/tokenize")
    assert answer.status == 200


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(stand: Stand) -> None:
    engines = costed_pair()
    await stand.start(engines)
    load_prefill(stand)
    for engine in stand.pool.engines:
        engine.unanswered_tokens, engine.progressed_at = 1_000_000, stand.pool.clock()
    answer = await stand.post(completion(stream=True), headers={"X-Request-Timeout": "10"})
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (503, "deadline_exceeded")
    assert "is estimated to take" in error["message"]
    assert int(answer.headers["Retry-After"]) >= 15
    assert [engine.seen for engine in engines] == [[], []]
    assert stand.metric("pdlaunch_router_deadlines_refused_total") == 1
    # However wrong an estimate is, nobody is sent away for long.
    for engine in stand.pool.engines:
        engine.unanswered_tokens = 10**9
    answer = await stand.post(completion(stream=True), headers={"X-Request-Timeout": "1.5"})
    assert int(answer.headers["Retry-After"]) == MAX_RETRY_AFTER_S
    for engine in stand.pool.engines:
        engine.unanswered_tokens = 0
    answer = await stand.post(completion(), headers={"X-Request-Timeout": "15"})
    assert answer.status == 200


@pytest.mark.parametrize("headers", [{}, {"X-Request-Timeout": "1000"}])
async def test_estimates_refuse_nobody_for_a_limit_that_is_not_the_clients(
    stand: Stand, headers: dict[str, str]
) -> None:
    """They may be wrong: past ``request_timeout_s`` by the estimate, answered at once in truth."""
    engines = costed_pair()
    await stand.start(engines)
    for engine in stand.pool.engines:
        engine.unanswered_tokens, engine.progressed_at = 2_000_000, stand.pool.clock()
    answer = await stand.post(completion(), headers=headers)
    assert answer.status == 200
    told_ms = float(answer.headers[ROUTE_HEADER].partition("ttft_ms=")[2].partition(";")[0])
    assert told_ms > 1000 * SPEC.request_timeout_s
    assert stand.metric("pdlaunch_router_deadlines_refused_total") == 0


@pytest.mark.parametrize("why", ["asked for", "setting"])
async def test_a_pair_that_is_wanted_must_meet_the_deadline_itself(stand: Stand, why: str) -> None:
    """Though decode alone would: it is not asked."""
    engines = costed_pair()
    await stand.start(engines)
    load_prefill(stand)
    headers = {"X-Request-Timeout": "10"}
    if why == "asked for":
        headers[ROUTE_HEADER] = WANTS_PAIR
    else:
        stand.pool._policy = LeastCost(prefers_pairs=True)
    answer = await stand.post(completion(), headers=headers)
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (503, "deadline_exceeded")
    assert "prefill-0->decode-0, is estimated to take" in error["message"]
    assert [engine.seen for engine in engines] == [[], []]
    load_prefill(stand, 0)
    assert (await stand.post(completion(), headers=headers)).status == 200
    assert [len(engine.seen) for engine in engines] == [1, 1]


async def test_one_token_that_comes_too_late_is_refused_too(stand: Stand) -> None:
    engines = costed_pair()
    await stand.start(engines)
    for engine in stand.pool.engines:
        engine.unanswered_tokens, engine.progressed_at = 1_000_000, stand.pool.clock()
    headers = {"X-Request-Timeout": "10"}
    answer = await stand.post(completion(max_tokens=1), headers=headers)
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert [engine.seen for engine in engines] == [[], []]


async def test_after_a_failure_the_engines_that_are_left_must_meet_the_deadline(
    stand: Stand,
) -> None:
    engines = [*costed_pair(), FakeEngine("prefill-1", "prefill")]
    engines[2].costs = costs("prefill")
    await stand.start(engines)
    for engine in stand.pool.engines:
        if engine.name != "prefill-0":
            engine.unanswered_tokens, engine.progressed_at = 1_000_000, stand.pool.clock()
    engines[0].status = 500
    headers = {"X-Request-Timeout": "10", ROUTE_HEADER: WANTS_PAIR}
    answer = await stand.post(completion(), headers=headers)
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert [len(engine.seen) for engine in engines] == [1, 0, 0]


async def test_a_deadline_ends_a_request_that_was_begun(stand: Stand) -> None:
    (engine,) = decodes(1)
    engine.hold_after = 2
    await stand.start([engine])
    request = asyncio.ensure_future(stand.post(completion(), headers={"X-Request-Timeout": "15"}))
    await engine.holding.wait()
    pass_time(15.0)
    answer = await request
    assert answer.status == 503
    assert answer.json()["error"]["message"] == "the request was not answered within 15 s"
    await asyncio.wait_for(engine.aborted.wait(), 60)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan", ""])
async def test_a_timeout_that_is_none_is_refused(stand: Stand, value: str) -> None:
    await stand.start(decodes(1))
    answer = await stand.post(completion(), headers={"X-Request-Timeout": value})
    error = msgspec.json.decode(answer.raw)["error"]
    assert (answer.status, error["param"]) == (400, "X-Request-Timeout")
