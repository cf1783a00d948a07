import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pdlaunch.observe.counters import COUNTERS
from pdlaunch.observe.metrics import (
    ERROR_STATUSES,
    INTER_TOKEN_BUCKETS_S,
    RequestClock,
    RequestMetrics,
)
from pdlaunch.transfer.proof import LATE, UNPROVEN
from tests.test_budgets import PACKAGE

LABELS = {"model": 'a"b'}


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"pdlaunch_{name}", LABELS | labels)


def test_requests_are_counted_by_reason_and_status() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, LABELS)
    # ``increase`` of a series that begins with 1 is 0: those of errors are there from the start.
    for status in ERROR_STATUSES:
        assert value(registry, "request_errors_total", status=str(status)) == 0
    for reason in ("stop", "stop", "length"):
        metrics.finished(reason)
    metrics.failed(429)
    assert value(registry, "request_success_total", finished_reason="stop") == 2
    assert value(registry, "request_errors_total", status="429") == 1
    assert b"_created" not in generate_latest(registry)


gaps = st.floats(0, 5) | st.sampled_from(INTER_TOKEN_BUCKETS_S)


@given(st.lists(gaps, max_size=30))
def test_tokens_are_counted_as_the_library_would(gaps_s: list[float]) -> None:
    registry, usual = CollectorRegistry(), CollectorRegistry()
    metrics = RequestMetrics(registry, LABELS)
    gap = Histogram(
        "pdlaunch_inter_token_latency_seconds",
        "Time between output tokens.",
        ["model"],
        buckets=INTER_TOKEN_BUCKETS_S,
        registry=usual,
    ).labels('a"b')
    tokens = Counter(
        "pdlaunch_generation_tokens", "Output tokens sent to clients.", ["model"], registry=usual
    ).labels('a"b')
    for gap_s in gaps_s:
        metrics.sent(1, gap_s)
        gap.observe(gap_s)
        tokens.inc()
    assert generate_latest(usual) in generate_latest(registry)
    (found,) = registry.restricted_registry(["pdlaunch_generation_tokens_total"]).collect()
    assert [sample.value for sample in found.samples] == [len(gaps_s)]


def test_a_clock_measures_to_the_first_token_and_between_those_of_each_choice() -> None:
    registry = CollectorRegistry()
    now_at = 0.0
    clock = RequestClock(RequestMetrics(registry, LABELS), lambda: now_at)
    for at, choice, num_tokens in ((2.0, 0, 1), (3.0, 1, 1), (4.0, 0, 2), (5.0, 1, 0)):
        now_at = at
        clock.tokens(choice, num_tokens)
    clock.end(4)
    assert value(registry, "time_to_first_token_seconds_sum") == 2.0
    # Two tokens that came together, two seconds after the one before them.
    assert value(registry, "inter_token_latency_seconds_sum") == pytest.approx(1.0)
    assert value(registry, "inter_token_latency_seconds_count") == 1
    assert value(registry, "generation_tokens_total") == 4
    assert value(registry, "e2e_request_latency_seconds_sum") == 5.0


def test_every_counter_that_the_engine_names_is_in_the_table() -> None:
    """A name without a row would fail the whole scrape of ``/metrics``."""
    named = {UNPROVEN, LATE}
    for path in (*(PACKAGE / "engine").rglob("*.py"), *(PACKAGE / "transfer").rglob("*.py")):
        named |= set(re.findall(r'(?:counts\[|counter=)"(\w+)(?:/\w+)?"', path.read_text()))
    assert "num_preemptions" in named
    assert named <= COUNTERS.keys()
