"""Keeps what clients saw in the last five minutes: rates and times, from the router's counters."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pdlaunch.http.errors import CLIENT_CLOSED_REQUEST
from pdlaunch.protocol.status import Percentiles, Rates
from pdlaunch.router.metrics import RouterMetrics

STEP_S = 2.0
LENGTH_S = 300.0
NOW_S = 10.0
"""The span of ``now``."""

_FIRST_TOKEN = "pdlaunch_router_time_to_first_token_seconds_bucket"
_INTER_TOKEN = "pdlaunch_router_inter_token_latency_seconds_bucket"
_REQUESTS = "pdlaunch_router_request_success_total"
_ERRORS = "pdlaunch_router_request_errors_total"
_PROMPT_TOKENS = "pdlaunch_router_prompt_tokens_total"
_OUTPUT_TOKENS = "pdlaunch_router_generation_tokens_total"
_NAMES = (_FIRST_TOKEN, _INTER_TOKEN, _REQUESTS, _ERRORS, _PROMPT_TOKENS, _OUTPUT_TOKENS)

Buckets = Mapping[float, float]
"""The number that took at most so many seconds."""


class Totals(NamedTuple):
    """Holds the router's counters at an instant of both clocks."""

    at: float
    now_at: float
    sums: Mapping[str, float]
    buckets: Mapping[str, Buckets]

    @property
    def requests(self) -> int:
        return int(self.sums[_REQUESTS])

    @property
    def errors(self) -> int:
        return int(self.sums[_ERRORS])


class RateHistory:
    """Takes the counters every ``STEP_S``; both clocks count seconds, ``wall_clock`` Unix time."""

    def __init__(
        self,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._past: deque[Totals] = deque([self.totals()], maxlen=int(LENGTH_S / STEP_S) + 1)

    def take(self) -> None:
        """Keep the counters as they are now; called every ``STEP_S``."""
        self._past.append(self.totals())

    def points(self, number: int | None = None) -> list[Rates]:
        """Return the rates between all that was kept, oldest first; the last ``number`` of them."""
        pairs = list(itertools.pairwise(self._past))
        return [_between(*pair) for pair in (pairs if number is None else pairs[-number:])]

    def now(self, totals: Totals) -> Rates:
        """Return the rates of the last ten seconds."""
        since_at = totals.now_at - NOW_S - STEP_S / 2
        recent = (past for past in self._past if past.now_at >= since_at)
        return _between(next(recent, self._past[-1]), totals)

    def totals(self) -> Totals:
        """Return the counters as they are now."""
        sums = dict.fromkeys(_NAMES, 0.0)
        buckets: dict[str, dict[float, float]] = {_FIRST_TOKEN: {}, _INTER_TOKEN: {}}
        for sample in self._metrics.samples(_NAMES):
            if sample.name in buckets:
                buckets[sample.name][float(sample.labels["le"])] = sample.value
            # A client that has left is no error of the deployment.
            elif sample.labels.get("status") != str(CLIENT_CLOSED_REQUEST):
                sums[sample.name] += sample.value
        return Totals(self._wall_clock(), self._clock(), sums, buckets)


def _between(before: Totals, after: Totals) -> Rates:
    span_s = after.now_at - before.now_at

    def rate(name: str) -> float:
        return (after.sums[name] - before.sums[name]) / span_s if span_s > 0 else 0.0

    return Rates(
        at=after.at,
        span_s=span_s,
        requests_per_s=rate(_REQUESTS),
        errors_per_s=rate(_ERRORS),
        prompt_tokens_per_s=rate(_PROMPT_TOKENS),
        output_tokens_per_s=rate(_OUTPUT_TOKENS),
        first_token_ms=percentiles(before.buckets[_FIRST_TOKEN], after.buckets[_FIRST_TOKEN]),
        inter_token_ms=percentiles(before.buckets[_INTER_TOKEN], after.buckets[_INTER_TOKEN]),
    )


def percentiles(before: Buckets, after: Buckets) -> Percentiles | None:
    """Estimate from what came into each bucket, as if it lay evenly in it; None without any."""
    upto = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    most = max(upto.values(), default=0.0)
    if most <= 0:
        return None

    def time_ms(wanted: float) -> float:
        low, below = 0.0, 0.0
        for bound, number in upto.items():
            # The last bucket has no end: its beginning is the best that is known.
            if bound == float("inf"):
                break
            if number >= wanted and number > below:
                return (low + (wanted - below) / (number - below) * (bound - low)) * 1e3
            low, below = bound, number
        return low * 1e3

    return Percentiles(p50=time_ms(0.5 * most), p95=time_ms(0.95 * most))
