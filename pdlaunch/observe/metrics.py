"""Defines the Prometheus metrics that the router and the engines' servers share.

Metrics of engines have vLLM's names with the prefix ``pdlaunch_``; the router's begin with
``pdlaunch_router_``. One request to the router is two or more requests to engines, so a sum over
both would count it several times. Label names and values are fixed at construction.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

import prometheus_client as prometheus
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdlaunch.observe.counters import (
    INTER_TOKEN_BUCKETS_S,
    REQUEST_BUCKETS_S,
    TOKEN_BUCKETS,
    TTFT_BUCKETS_S,
)

# Label values that are exported from the start, at 0; others appear once they occur
FINISH_REASONS = ("stop", "length", "abort", "error")
# Likewise. 499: the client went away; 502: engines failed the request
ERROR_STATUSES = (400, 401, 404, 408, 413, 429, 499, 500, 502, 503)

# Without ``_created`` samples: Prometheus would store each as a series of its own.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]


def buckets_of(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the cumulative buckets of a ``HistogramMetricFamily``; the last count is for +Inf."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


class RequestMetrics(Collector):
    """Counts requests, tokens and latencies as clients of a process see them. Not thread-safe."""

    def __init__(
        self,
        registry: prometheus.CollectorRegistry,
        labels: Mapping[str, str],
        prefix: str = "pdlaunch_",
    ) -> None:
        names, values = tuple(labels), tuple(labels.values())

        def histogram(name: str, text: str, buckets: Sequence[float]) -> prometheus.Histogram:
            return prometheus.Histogram(
                f"{prefix}{name}", text, names, registry=registry, buckets=buckets
            ).labels(*values)

        def counter(name: str, text: str, *more: str) -> prometheus.Counter:
            return prometheus.Counter(f"{prefix}{name}", text, (*names, *more), registry=registry)

        self._prefix = prefix
        self._names, self._values = names, values
        self._finished = counter(
            "request_success", "Finished requests by reason.", "finished_reason"
        )
        self._failed = counter("request_errors", "Refused or failed requests.", "status")
        self.in_flight: prometheus.Gauge = prometheus.Gauge(
            f"{prefix}http_requests_in_flight", "Requests being answered.", names, registry=registry
        ).labels(*values)
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time to the first token.", TTFT_BUCKETS_S
        )
        self.request_time = histogram(
            "e2e_request_latency_seconds", "Time to the last token.", REQUEST_BUCKETS_S
        )
        self.prompt_length = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self.output_length = histogram(
            "request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.").labels(
            *values
        )
        # Plain numbers, because each token updates them: prometheus_client's classes took an eighth
        # of the router's time per token.
        self._gap_counts = [0] * (len(INTER_TOKEN_BUCKETS_S) + 1)
        self._gaps_s = 0.0
        self._num_tokens = 0
        for reason in FINISH_REASONS:
            self._finished.labels(*values, reason)
        for status in ERROR_STATUSES:
            self._failed.labels(*values, str(status))
        registry.register(self)

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._values, reason).inc()

    def failed(self, status: int) -> None:
        self._failed.labels(*self._values, str(status)).inc()

    def sent(self, num_tokens: int, gap_s: float | None = None) -> None:
        """Count output tokens sent to the client, ``gap_s`` after the previous ones."""
        self._num_tokens += num_tokens
        if gap_s is not None:
            # Tokens that are sent together share the gap in equal parts.
            mean_s = gap_s / num_tokens
            self._gap_counts[bisect_left(INTER_TOKEN_BUCKETS_S, mean_s)] += 1
            self._gaps_s += mean_s

    def collect(self) -> Iterator[Metric]:
        gaps = HistogramMetricFamily(
            f"{self._prefix}inter_token_latency_seconds",
            "Time between output tokens.",
            labels=self._names,
        )
        gaps.add_metric(
            self._values, buckets_of(INTER_TOKEN_BUCKETS_S, self._gap_counts), self._gaps_s
        )
        yield gaps
        tokens = CounterMetricFamily(
            f"{self._prefix}generation_tokens", "Output tokens sent to clients.", labels=self._names
        )
        tokens.add_metric(self._values, self._num_tokens)
        yield tokens

    def describe(self) -> Iterator[Metric]:
        return self.collect()


class RequestClock:
    def __init__(
        self, metrics: RequestMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_at = clock()
        self.first_token_at: float | None = None
        self._last_at: dict[int, float] = {}
        """Time of the last token, by index of the choice."""

    @property
    def last_token_at(self) -> float:
        return max(self._last_at.values())

    @property
    def num_choices(self) -> int:
        return len(self._last_at)

    def tokens(self, choice: int, num_tokens: int) -> None:
        """Count new tokens of a choice that are sent to the client."""
        if not num_tokens:
            return
        now_at = self._clock()
        last_at = self._last_at.get(choice)
        if not self._last_at:
            self.first_token_at = now_at
            self._metrics.time_to_first_token.observe(now_at - self._start_at)
        self._metrics.sent(num_tokens, None if last_at is None else now_at - last_at)
        self._last_at[choice] = now_at

    def end(self, num_output_tokens: int) -> None:
        self._metrics.request_time.observe(self._clock() - self._start_at)
        self._metrics.output_length.observe(num_output_tokens)
