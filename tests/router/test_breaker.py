"""Breakers keep requests off what fails, and find out when it works again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.router.health import MAX_OPEN_S, NUM_GOOD, OPEN_S, TRY_LASTS_S, Breaker


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


def test_a_try_of_which_nothing_is_heard_makes_room_for_the_next() -> None:
    breaker = Breaker()
    breaker.failed(0.0)
    breaker.asked(OPEN_S)
    assert breaker.takes(OPEN_S + TRY_LASTS_S)


def test_each_failed_try_opens_it_for_twice_as_long() -> None:
    breaker, now_at, lengths = Breaker(), 0.0, []
    for _ in range(1100):
        breaker.failed(now_at)
        lengths.append(breaker.open_until_at - now_at)
        now_at = breaker.open_until_at
        breaker.asked(now_at)
    assert lengths[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_OPEN_S]
    assert lengths[-1] == MAX_OPEN_S


def test_failures_at_once_count_as_one() -> None:
    breaker = Breaker()
    for _ in range(40):
        breaker.failed(5.0)
    assert breaker.open_until_at == 5.0 + OPEN_S


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
