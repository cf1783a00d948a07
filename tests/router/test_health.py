"""Engines and pairs that fail are left out, until a try shows that they are well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Registry
from pdlaunch.router.engine import Engine
from pdlaunch.router.health import MAX_OPEN_S, NUM_GOOD, OPEN_S, TRY_LASTS_S, Breaker
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.router.pool import EnginePool
from tests.router.test_policy import HEALTH, engine, prompt
from tests.router.test_pool import Clock


def test_a_failure_opens_it_and_one_try_at_a_time_closes_it() -> None:
    breaker = Breaker()
    breaker.failed(10.0)
    assert (breaker.state(10.0), breaker.takes(10.0)) == ("open", False)
    assert breaker.why(10.0) == "open after 1 failures, tried again in 1.0 s"
    at = 10.0 + OPEN_S
    assert (breaker.state(at), breaker.wants_try(at)) == ("half_open", True)
    breaker.asked(at)
    assert not breaker.takes(at)
    assert breaker.why(at) == "half-open, being tried"
    breaker.answers(at + 0.1)
    assert (breaker.state(at + 0.1), breaker.takes(at + 0.1)) == ("closed", True)


def test_each_failed_try_opens_it_for_twice_as_long() -> None:
    breaker, now_at, lengths = Breaker(), 0.0, []
    for _ in range(1100):
        breaker.failed(now_at)
        lengths.append(breaker.open_until_at - now_at)
        now_at = breaker.open_until_at
        breaker.asked(now_at)
    assert lengths[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_OPEN_S]
    assert lengths[-1] == MAX_OPEN_S


def test_what_was_sent_before_closes_it_after_a_single_failure_alone() -> None:
    breaker = Breaker()
    breaker.failed(0.0)
    breaker.succeeded(0.1)
    assert breaker.state(0.1) == "closed"
    breaker.failed(0.2)
    breaker.succeeded(0.3)
    assert breaker.state(0.3) == "open"


def test_who_fails_now_and_then_is_left_out_longer_and_longer() -> None:
    breaker, now_at = Breaker(), 0.0
    for _ in range(4):
        for _ in range(NUM_GOOD - 1):
            breaker.succeeded(now_at)
        breaker.failed(now_at)
        now_at = breaker.open_until_at
    assert breaker.num_failures == 4
    for _ in range(NUM_GOOD):
        breaker.succeeded(now_at)
    assert breaker.num_failures == 0


@given(st.lists(st.tuples(st.sampled_from(["ask", "fail", "answer", "end"]), st.floats(0, 40))))
def test_it_never_stays_shut(events: list[tuple[str, float]]) -> None:
    breaker, now_at = Breaker(), 0.0
    for event, seconds in events:
        now_at += seconds
        {
            "ask": breaker.asked,
            "fail": breaker.failed,
            "answer": breaker.answers,
            "end": breaker.succeeded,
        }[event](now_at)
        assert breaker.takes(now_at) == (breaker.why(now_at) == "")
        assert breaker.open_until_at - now_at <= MAX_OPEN_S + 1e-9  # of the difference of floats
        assert breaker.takes(now_at + MAX_OPEN_S + TRY_LASTS_S)
    now_at = max(now_at, breaker.open_until_at)
    breaker.succeeded(now_at)
    assert breaker.state(now_at) == "closed"


class Pool(EnginePool):
    """Holds engines that no registry has named."""

    def __init__(self, clock: Clock, *engines: Engine) -> None:
        super().__init__(clock)
        self.update(Registry(version=1, entries=[]))
        self._engines = {one.name: one for one in engines}


def test_failed_pulls_leave_out_the_pair_and_no_engine() -> None:
    clock = Clock()
    prefill, decode = engine("prefill-0"), engine("decode-0")
    other = engine("decode-1", kv_tokens=900)
    pool = Pool(clock, prefill, decode, other)
    assert pool.route(prompt()).name == "prefill-0->decode-0"
    pool.pulled(prefill, decode, ok=False)
    route = pool.route(prompt())
    assert route.name == "prefill-0->decode-1"
    clock.now_s += OPEN_S
    # The pair is tried once, and closed by a pull that comes through.
    assert pool.route(prompt()).name == "prefill-0->decode-0"
    assert pool.route(prompt()).name == "prefill-0->decode-1"
    for _ in range(8):
        pool.pulled(prefill, decode, ok=True)
    assert pool.pair_states() == {}


@given(
    st.lists(
        st.builds(engine, st.sampled_from(["decode-0", "decode-1", "decode-2"]), health=HEALTH),
        min_size=1,
        unique_by=lambda one: one.name,
    )
)
def test_none_is_left_out_for_ever(engines: list[Engine]) -> None:
    clock = Clock()
    pool = Pool(clock, *engines)
    sick = {one.name for one in engines if one.health.is_tripped}
    asked: set[str] = set()
    for _ in range(40):
        clock.now_s += 2.0
        for _ in range(3):
            (one,) = pool.route(RoutingRequest(is_begun=True)).engines
            asked.add(one.name)
            if one.name in sick:
                one.health.failed(clock())
    assert MAX_OPEN_S + TRY_LASTS_S < 80.0
    assert sick <= asked
