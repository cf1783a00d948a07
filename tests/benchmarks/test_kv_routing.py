"""What routing by KV events is for, on simulated engines."""

from __future__ import annotations

from benchmarks.kv_routing import measure_trace, simulate_chats


def test_chats_find_all_that_is_cached_somewhere() -> None:
    ours, pairs = simulate_chats(always_pairs=False), simulate_chats(always_pairs=True)
    assert ours["cached_share"] >= 1.15 * pairs["cached_share"]
    assert ours["cached_share"] >= ours["possible_share"] - 0.02


def test_shared_prefixes_stay_where_they_are_though_caches_are_too_small() -> None:
    by_load = measure_trace(4, by_load=True, num_prompts=1_500)
    assert measure_trace(4, by_load=False, num_prompts=1_500) >= 1.3 * by_load
