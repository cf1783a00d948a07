from __future__ import annotations

from prometheus_client import CollectorRegistry

from pdlaunch.engine.server.metrics import ServerMetrics
from pdlaunch.observe.metrics import render_metrics
from pdlaunch.router.engine_readings import NAMES, EngineHistory, scan


def counts(**values: float) -> dict[str, float]:
    return values


def test_every_word_is_on_the_page_of_a_native_engine() -> None:
    """A metric that gets another name would else be missing without a word."""
    metrics = ServerMetrics(CollectorRegistry(), engine="e", role="decode", model_name="m")
    found = scan(render_metrics(metrics.registry).decode())
    assert set(found) == set(NAMES.values())


def test_labels_are_summed_and_the_fullest_cache_counts() -> None:
    found = scan(
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0"} 2.0\n'
        'vllm:num_requests_running{engine="1"} 3.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:kv_cache_usage_perc{engine="1"} 0.25\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="p",prefill="prefill-0"} 10\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="q",prefill="prefill-0"} 5\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="p",prefill="prefill-1"} 7\n'
        'vllm:prompt_tokens_total{engine="0"} NaN\n'
        "vllm:num_preemptions_total -1\n"
        "vllm:generation_tokens_total many\n"
        "nonsense\n"
        "\n"
    )
    assert found == {
        "running": 5.0,
        "kv_usage": 0.5,
        "pulled_bytes@prefill-0": 15.0,
        "pulled_bytes@prefill-1": 7.0,
    }


def test_rates_are_of_the_last_seconds_and_shares_of_the_last_minute() -> None:
    book = EngineHistory((1,))
    book.add(0.0, counts(prompt_tokens=100, device_hits=100, output_tokens=0, pulled_bytes=0))
    book.add(50.0, counts(prompt_tokens=300, device_hits=150, output_tokens=0, pulled_bytes=0))
    later = counts(
        prompt_tokens=300, device_hits=150, output_tokens=50, pulled_bytes=8e9, pull_seconds=2
    )
    book.add(55.0, later)
    shown = book.reading(56.0)
    assert shown is not None
    assert shown.age_s == 1.0
    assert (shown.output_tokens_per_s, shown.pulled_bytes_per_s) == (10.0, 1.6e9)
    assert shown.pull_gigabytes_per_s == 4.0
    assert shown.cache is not None
    assert (shown.cache["device"], shown.cache["remote"]) == (0.25, 0.0)
    # A minute later there were no prompts.
    book.add(120.0, later)
    shown = book.reading(120.0)
    assert shown is not None
    assert shown.cache is None
    assert shown.output_tokens_per_s == 0.0


def test_counts_that_begin_again_are_no_negative_rates() -> None:
    book = EngineHistory((1,))
    book.add(0.0, counts(output_tokens=1000, pull_failures=5))
    assert book.add(3.0, counts(output_tokens=10, pull_failures=1)) == {}
    shown = book.reading(3.0)
    assert shown is not None
    assert shown.output_tokens_per_s == 0.0
    assert book.add(5.0, counts(output_tokens=20, pull_failures=2))["pull_failures"] == 1


def test_pulls_of_a_pair_are_told_apart_where_an_engine_does() -> None:
    book = EngineHistory((1,))
    book.add(0.0, {"pulled_bytes": 9, "pulled_bytes@p-0": 4, "pulls@p-0": 1})
    book.add(4.0, {"pulled_bytes": 29, "pulled_bytes@p-0": 12, "pulls@p-0": 3})
    pulls = book.pulls("p-0")
    assert (pulls.number, pulls.num_bytes, pulls.bytes_per_s) == (3, 12, 2.0)
    other = book.pulls("p-1")
    assert other.num_bytes == 0
