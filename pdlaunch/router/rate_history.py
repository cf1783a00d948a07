"""Keeps what clients saw in the last five minutes: rates and times, from the router's counters."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    requests: float
    errors: float
    prompt_tokens: float
    output_tokens: float
    first_token: Buckets
    inter_token: Buckets


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
        return Totals(
            at=self._wall_clock(),
            now_at=self._clock(),
            requests=sums[_REQUESTS],
            errors=sums[_ERRORS],
            prompt_tokens=sums[_PROMPT_TOKENS],
            output_tokens=sums[_OUTPUT_TOKENS],
            first_token=buckets[_FIRST_TOKEN],
            inter_token=buckets[_INTER_TOKEN],
        )


def _between(before: Totals, after: Totals) -> Rates:
    span_s = after.now_at - before.now_at

    def rate(now: float, then: float) -> float:
        return (now - then) / span_s if span_s > 0 else 0.0

    return Rates(
        at=after.at,
        span_s=span_s,
        requests_per_s=rate(after.requests, before.requests),
        errors_per_s=rate(after.errors, before.errors),
        prompt_tokens_per_s=rate(after.prompt_tokens, before.prompt_tokens),
        output_tokens_per_s=rate(after.output_tokens, before.output_tokens),
        first_token_ms=percentiles(before.first_token, after.first_token),
        inter_token_ms=percentiles(before.inter_token, after.inter_token),
    )


def percentiles(before: Buckets, after: Buckets) -> Percentiles | None:
    """Estimate from what came into each bucket, as if it lay evenly in it; None without any."""
    bounds = sorted(after)
    upto = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    if not bounds or upto[-1] <= 0:
        return None
    return Percentiles(
        p50=_percentile(0.5, bounds, upto) * 1e3, p95=_percentile(0.95, bounds, upto) * 1e3
    )


def _percentile(share: float, bounds: Sequence[float], upto: Sequence[float]) -> float:
    wanted = share * upto[-1]
    low, below = 0.0, 0.0
    for bound, number in zip(bounds, upto, strict=True):
        # The last bucket has no end: its beginning is the best that is known.
        if number >= wanted and number > below and bound < float("inf"):
            return low + (wanted - below) / (number - below) * (bound - low)
        if bound < float("inf"):
            low, below = bound, number
    return low
