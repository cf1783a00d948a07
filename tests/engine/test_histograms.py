"""Times of requests, as ranks count them for the histograms of /metrics."""

from __future__ import annotations

from pdlaunch.engine.histograms import Histograms
from pdlaunch.protocol.engine import HistogramSeries
from tests.engine.fake_engine import FakeEngine


class Clock:
    """Goes on by 1 s with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def histograms_of(engine: FakeEngine) -> Histograms:
    engine.scheduler.requests.histograms = histograms = Histograms(Clock())
    return histograms


def shown_by(histograms: Histograms) -> dict[str, HistogramSeries]:
    return {series.name: series for series in histograms.shown()}


def count(found: HistogramSeries) -> int:
    return sum(found.counts)


def test_the_phases_of_a_request_add_up() -> None:
    engine = FakeEngine()
    histograms = histograms_of(engine)
    engine.add("a", range(6), max_tokens=3)
    engine.run()
    shown = shown_by(histograms)
    # The clock was looked at on arrival, in the batch, and for each of three tokens.
    sums = {name: found.sum for name, found in shown.items()}
    assert sums["request_queue_time_seconds"] == 1
    assert sums["request_prefill_time_seconds"] == 1
    assert sums["request_decode_time_seconds"] == 2
    assert sums["request_inference_time_seconds"] == 3
    assert sums["request_time_per_output_token_seconds"] == 1
    assert sums["request_prefill_kv_computed_tokens"] == 6
    assert sums["iteration_tokens_total"] == 6 + 2
    assert {count(shown[name]) for name in shown if name.startswith("request_")} == {1}
    assert count(shown["iteration_tokens_total"]) == 3


def test_a_request_that_never_ran_took_no_time() -> None:
    engine = FakeEngine(max_num_seqs=1)
    histograms = histograms_of(engine)
    engine.add("a", range(6), max_tokens=3)
    engine.add("b", range(6), max_tokens=3)
    engine.scheduler.requests.abort("b")
    engine.run()
    shown = shown_by(histograms)
    assert count(shown["request_queue_time_seconds"]) == 1
