"""Engines that fail or are slow are left out, until a try shows that they are well."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Registry
from pdlaunch.router.breaker import MAX_OPEN_S, TRY_LASTS_S, Breaker
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine import Engine
from pdlaunch.router.health import state_of, survey
from pdlaunch.router.pace import NUM_SAMPLES, SLOW_AT, SLOW_TRY_S, Pace, slowness
from pdlaunch.router.policy import LeastWork, NoIndex, Policy, RoutingRequest
from pdlaunch.router.pool import EnginePool
from tests.router.test_cost_model import costed
from tests.router.test_policy import engine
from tests.router.test_pool import Clock

PROMPT = RoutingRequest(hop="prefill", num_prompt_tokens=512, max_tokens=64)


def pace(first_token: float = 1.0, gap: float = 1.0, num_samples: int = NUM_SAMPLES) -> Pace:
    made = Pace()
    for _ in range(num_samples):
        made.took("first_token", first_token, 1.0)
        made.took("gap", gap, 1.0)
    return made


class Pool(EnginePool):
    """Holds engines that no registry has named."""

    def __init__(self, clock: Clock, policy: Policy, engines: list[Engine]) -> None:
        super().__init__(clock, policy)
        self.update(Registry(version=1, entries=[]))
        self._engines = {one.name: one for one in engines}


def test_paces_are_compared_with_the_usual_one() -> None:
    assert slowness([pace(), pace(gap=4.0), pace(1.2)]) == pytest.approx([1.0, 4.0, 1.2])
    assert slowness([pace(10.0), pace()]) == pytest.approx([10.0, 1.0])
    # Alone, or after few answers, nobody is slow.
    assert slowness([pace(10.0)]) == [1.0]
    assert slowness([pace(), pace(10.0, num_samples=NUM_SAMPLES - 1)]) == [1.0, 1.0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_the_fastest_is_never_slow_nor_are_more_than_half(times: list[float]) -> None:
    found = slowness([pace(one) for one in times])
    assert found[times.index(min(times))] <= 1.0 + 1e-9
    assert sum(one > SLOW_AT for one in found) <= len(times) / 2


def test_one_odd_answer_makes_nobody_slow_and_a_few_good_ones_mend_it() -> None:
    odd = pace()
    odd.took("gap", 1000.0, 1.0)
    assert slowness([pace(), odd])[1] < SLOW_AT
    slow = pace(gap=10.0)
    for _ in range(3):
        slow.took("gap", 1.0, 1.0)
    assert slowness([pace(), slow])[1] < SLOW_AT


def test_a_slow_engine_gets_a_try_now_and_then() -> None:
    clock = Clock()
    fast, slow = costed("decode-0", pace=pace()), costed("decode-1", pace=pace(gap=4.0))
    fast.num_streams, fast.context_tokens = 20, 20_000
    pool = Pool(clock, LeastCost(), [fast, slow])
    asked = []
    for _ in range(21):
        asked.append(pool.route(PROMPT).name)
        clock.now_s += SLOW_TRY_S / 10
    assert [number for number, name in enumerate(asked) if name == "decode-1"] == [0, 10, 20]
    health = pool.health()
    assert health.left_out == {"decode-1": "4.0 times slower than its peers"}
    assert state_of(slow, health, clock()) == "slow"
    route = pool.route(PROMPT)
    assert route.left_out == health.left_out
    for _ in range(4):
        slow.pace.took("gap", 1.0, 1.0)
    assert pool.route(PROMPT).name == "decode-1"
    assert state_of(slow, pool.health(), clock()) == "closed"


def test_a_slow_engine_serves_where_its_peer_is_away() -> None:
    fast, slow = costed("decode-0", pace=pace()), costed("decode-1", pace=pace(gap=4.0))
    slow.pace.next_try_at = 1e9
    pool = Pool(Clock(), LeastCost(), [fast, slow])
    assert pool.route(PROMPT).name == "decode-0"
    pool.failed(fast)
    assert pool.route(PROMPT).name == "decode-1"


def test_failed_pulls_leave_out_the_pair_and_no_engine() -> None:
    clock = Clock()
    prefill, decode = costed("prefill-0"), costed("decode-0", num_streams=40, context_tokens=20_000)
    other = costed("decode-1", num_streams=45, context_tokens=24_000)
    pool = Pool(clock, LeastCost(), [prefill, decode, other])
    assert pool.route(PROMPT).name == "prefill-0->decode-0"
    pool.pulled(prefill, decode, ok=False)
    assert pool.health().left_out == {}
    assert pool.route(PROMPT).name == "prefill-0->decode-1"
    by_work = LeastWork().choose(PROMPT, pool.engines, [], NoIndex(), clock())
    assert (by_work.prefill, by_work.decode) == (prefill, other)
    clock.now_s += 1.0
    # The pair is tried once, and closed by a pull that comes through.
    route = pool.route(PROMPT)
    assert (route.name, route.reason) == ("prefill-0->decode-0", "a try of what was left out")
    assert pool.route(PROMPT).name == "prefill-0->decode-1"
    for _ in range(8):
        pool.pulled(prefill, decode, ok=True)
    assert decode.pulls == {}


def breakers() -> st.SearchStrategy[Breaker]:
    return st.builds(
        Breaker,
        is_tripped=st.booleans(),
        num_failures=st.integers(0, 9),
        open_until_at=st.floats(90, 110),
        tried_until_at=st.floats(90, 110),
    )


def of_any_health(make: object) -> st.SearchStrategy[list[Engine]]:
    return st.lists(
        st.builds(
            make,  # type: ignore[arg-type]
            st.sampled_from(["prefill-0", "prefill-1", "decode-0", "decode-1", "both-0"]),
            breaker=breakers(),
            pace=st.builds(pace, st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 4)),
            ready=st.booleans(),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda one: one.name,
    )


@given(st.one_of(of_any_health(engine), of_any_health(costed)), st.sampled_from([None, 1, 64]))
def test_whoever_is_left_out_somebody_serves(engines: list[Engine], max_tokens: int | None) -> None:
    request = RoutingRequest(hop="decode", num_prompt_tokens=512, max_tokens=max_tokens)
    for policy in (LeastWork(), LeastCost()):
        route = policy.choose(request, engines, [], NoIndex(), 100.0)
        ready = [one for one in engines if one.ready]
        assert (route.decode is not None) == bool(ready)
        if route.decode is not None and route.decode.name in route.left_out:
            # The least bad one, when there is no other.
            assert not survey(engines, 100.0).usable
            least = min(one.breaker.is_tripped * one.breaker.num_failures for one in ready)
            bad = route.decode.breaker
            assert bad.is_tripped * bad.num_failures == least


@given(of_any_health(costed))
def test_none_is_left_out_for_ever(engines: list[Engine]) -> None:
    clock = Clock()
    pool = Pool(clock, LeastCost(), engines)
    asked: set[str] = set()
    due = {one.name for one in engines if one.ready and one.role != "prefill"}
    for _ in range(40):
        clock.now_s += 2.0
        for _ in range(3):
            route = pool.route(PROMPT)
            first = route.prefill or route.decode
            if first is None:
                first = pool.route(RoutingRequest(hop="decode", max_tokens=64)).decode
            if first is not None:
                asked.add(first.name)
            if route.planned is not None:
                asked.add(route.planned.name)
            for name in asked & {one.name for one in engines if one.breaker.is_tripped}:
                next(one for one in engines if one.name == name).breaker.failed(clock())
    assert MAX_OPEN_S + TRY_LASTS_S < 80.0
    out = {one.name for one in engines if one.ready and one.breaker.is_tripped}
    assert due & out <= asked
