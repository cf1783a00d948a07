"""What routing by KV events is for, on simulated engines."""

from benchmarks.kv_routing import measure_trace, simulate_chats


def test_chats_find_all_that_is_cached_somewhere() -> None:
    ours, pairs = simulate_chats(always_pairs=False), simulate_chats(always_pairs=True)
    assert ours["cached_share"] >= 1.15 * pairs["cached_share"]
    assert ours["cached_share"] >= ours["possible_share"] - 0.02


def test_shared_prefixes_stay_where_they_are_though_caches_are_too_small() -> None:
    shares = [
        measure_trace(4, by_load=by_load, num_prompts=1_500)["cached_share"]
        for by_load in (False, True)
    ]
    assert shares[0] >= 1.3 * shares[1]
