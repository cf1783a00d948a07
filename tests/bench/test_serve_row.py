"""Rows have the right figures for known times."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pdlaunch.bench.serve.rows import BenchRow, TierRow, quantile_ms, summarise, tier_rows
from pdlaunch.bench.serve.target import Counters, parse_counters, since, total
from pdlaunch.bench.serve.timed_completion import TimedCompletion
from pdlaunch.engine.server.metrics import ServerMetrics
from pdlaunch.observe.metrics import render_metrics
from pdlaunch.protocol.engine import EngineStats

PAGE = """
# TYPE pdlaunch_kv_transfers_total counter
pdlaunch_kv_transfers_total{engine="decode-0",role="decode"} 3.0
pdlaunch_kv_transfers_total{engine="decode-1",role="decode"} 1.0
pdlaunch_kv_transfers_total{engine="prefill-0",role="prefill"} 0.0
# TYPE pdlaunch_num_requests_running gauge
pdlaunch_num_requests_running{engine="decode-0",role="decode"} 7.0
# TYPE pdlaunch_router_retries_total counter
pdlaunch_router_retries_total{hop="decode"} 5.0
# TYPE pdlaunch_request_prompt_tokens histogram
pdlaunch_request_prompt_tokens_bucket{role="decode",le="+Inf"} 9.0
pdlaunch_request_prompt_tokens_count{role="decode"} 9.0
pdlaunch_request_prompt_tokens_sum{role="decode"} 9.0
"""


def answered(*tokens_at: float) -> TimedCompletion:
    return TimedCompletion(start_at=0.0, tokens_at=list(tokens_at), num_tokens=len(tokens_at))


def failed(error: str) -> TimedCompletion:
    return TimedCompletion(start_at=0.0, tokens_at=[99.0], error=error)


def row(*done: TimedCompletion, counted: Counters | None = None, **limits: float) -> BenchRow:
    known: dict[str, float | None] = {"bare_gb_per_s": None, "step_ms": None}
    return summarise(8, 2, done, 4.0, counted or {}, **(known | limits))


def test_gap_and_inter_token_time_are_apart() -> None:
    found = row(
        answered(1.0, 3.0, 3.5, 4.0),
        answered(2.0, 6.0, 6.0, 7.0),
        failed("no"),
        failed("no"),
        failed("never"),
    )
    assert (found.num_requests, found.num_errors, found.errors) == (5, 3, ["2 x no", "1 x never"])
    assert (found.ttft_ms_median, found.ttft_ms_p99) == (1500, 2000)
    assert (found.first_gap_ms_median, found.first_gap_ms_p99) == (3000, 4000)
    assert (found.itl_ms_median, found.itl_ms_p99) == (500, 1000)
    assert found.tpot_ms_median == round((3000 + 5000) / 3 / 2, 2)
    assert found.together_share == round(1 / 6, 4)
    assert found.output_tokens_per_s == 2.0


def test_limits_from_other_benchmarks() -> None:
    counted = {
        ("decode", "kv_transfers"): 4,
        ("decode", "kv_transfer_bytes"): 80e6,
        ("decode", "kv_transfer_seconds"): 0.2,
    }
    found = row(answered(1.0, 2.0, 2.1, 2.2), counted=counted, bare_gb_per_s=0.5, step_ms=50.0)
    assert (found.kv_megabytes_mean, found.pull_ms_mean) == (20.0, 50.0)
    # 20 MB at 0.5 GB/s take 40 ms.
    assert found.first_gap_goal_ms == pytest.approx(1.5 * 100 + 40)
    assert (found.step_output_tokens_per_s, found.of_step_share) == (40.0, 0.025)


def test_of_nothing_nothing_is_said() -> None:
    found = row(
        failed("no"),
        answered(1.0),
        counted={("decode", "kv_transfers"): 0, ("decode", "kv_transfer_bytes"): 0},
    )
    assert found.ttft_ms_median == 1000
    unknown = (
        "first_gap_ms_median",
        "itl_ms_p99",
        "tpot_ms_median",
        "together_share",
        "kv_megabytes_mean",
        "first_gap_goal_ms",
    )
    assert all(getattr(found, name) is None for name in unknown)
    assert b"NaN" not in msgspec.json.encode(row(failed("no")))


def test_quantiles() -> None:
    seconds = [index / 1000 for index in range(1, 201)]
    assert (quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99), quantile_ms([], 0.5)) == (
        100.5,
        199.0,
        None,
    )


def test_counters_are_summed_by_role() -> None:
    counters = parse_counters(PAGE)
    assert counters == {("decode", "kv_transfers"): 4.0, ("prefill", "kv_transfers"): 0.0}
    assert (total(counters, "kv_transfers"), total(counters, "other")) == (4.0, None)


def test_what_began_again_is_not_counted() -> None:
    before = {("decode", "a"): 2.0, ("decode", "b"): 5.0}
    after = {("decode", "a"): 6.0, ("decode", "b"): 1.0, ("prefill", "a"): 1.0}
    assert since(after, before) == {("decode", "a"): 4.0}


def test_hit_rates_of_the_tiers_that_are_told() -> None:
    counters = {
        ("decode", "prefix_cache_queries"): 0.0,
        ("decode", "prompt_tokens_cached_by_source/device"): 0.0,
        ("prefill", "prefix_cache_queries"): 300.0,
        ("prefill", "prompt_tokens_cached_by_source/device"): 30.0,
        ("prefill", "prompt_tokens_cached_by_source/host"): 200.0,
    }
    assert tier_rows(counters) == [
        TierRow(role="prefill", tier="device", hit_share=0.1),
        TierRow(role="prefill", tier="host", hit_share=0.667),
    ]


def test_the_tiers_are_named_as_the_engines_name_them() -> None:
    metrics = ServerMetrics(
        CollectorRegistry(), engine="prefill-0", role="prefill", model_name="tiny"
    )
    metrics.engine.stats = EngineStats(
        prompt_tokens=100,
        device_hit_tokens=10,
        host_hit_tokens=20,
        remote_hit_tokens=30,
        transfers=1,
        transfer_bytes=7,
    )
    counters = parse_counters(render_metrics(metrics.registry).decode())
    assert {row.tier: row.hit_share for row in tier_rows(counters)} == {
        "device": 0.1,
        "host": 0.2,
        "remote": 0.3,
    }
    assert (total(counters, "kv_transfers"), total(counters, "kv_transfer_bytes")) == (1, 7)
    assert total(counters, "kv_transfer_seconds") == 0
