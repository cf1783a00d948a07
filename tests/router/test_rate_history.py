from __future__ import annotations

from pdlaunch.observe.metrics import RequestClock
from pdlaunch.router.deployment_view import RateHistory, percentiles
from pdlaunch.router.metrics import RouterMetrics

INF = float("inf")


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_rates_errors_and_times_of_each_step() -> None:
    clock, metrics = Clock(), RouterMetrics("m")
    history = RateHistory(metrics, clock, lambda: clock.at + 1e9)
    request = RequestClock(metrics.requests, clock)
    clock.at += 0.5
    request.tokens(0, 1)
    clock.at += 1.5
    request.tokens(0, 3)
    metrics.requests.finished("stop")
    metrics.requests.failed(503)
    metrics.requests.failed(499)  # its client left
    history.take()
    clock.at += 2.0
    history.take()
    busy, idle = history.points()
    assert (busy.requests_per_s, busy.errors_per_s, busy.output_tokens_per_s) == (0.5, 0.5, 2.0)
    assert busy.at == clock.at - 2.0 + 1e9
    assert busy.first_token_ms is not None
    assert 250 < busy.first_token_ms.p50 <= 500
    assert busy.inter_token_ms is not None
    assert 300 < busy.inter_token_ms.p95 <= 500
    assert (idle.requests_per_s, idle.first_token_ms) == (0.0, None)
    assert history.now(history.totals()).requests_per_s == 0.25
    assert [point.at for point in history.points(1)] == [idle.at]


def test_percentiles_lie_within_their_buckets() -> None:
    bounds = [1.0, 2.0, 4.0, INF]
    before = dict.fromkeys(bounds, 7.0)

    def after(*numbers: int) -> dict[float, float]:
        sums = [7.0 + sum(numbers[: index + 1]) for index in range(len(numbers))]
        return dict(zip(bounds, sums, strict=True))

    assert percentiles(before, after(0, 0, 0, 0)) is None
    found = percentiles(before, after(10, 0, 10, 0))
    assert found is not None
    assert (found.p50, found.p95) == (1000.0, 3800.0)
    last = percentiles({}, {1.0: 0.0, INF: 5.0})
    assert last is not None
    assert last.p50 == 1000.0
