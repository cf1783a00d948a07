"""Defines the Prometheus metrics that the router and the engines' servers share.

Names of engines are vLLM's with the prefix ``pdlaunch_``, those of the router begin with
``pdlaunch_router_``: a request that the router serves is two or more at engines, and no sum may add
them up. Label names and values are fixed at construction.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdlaunch.observe.histograms import (
    INTER_TOKEN_BUCKETS_S,
    REQUEST_BUCKETS_S,
    TOKEN_BUCKETS,
    TTFT_BUCKETS_S,
)

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")
"""Shown from the start, others once they occur."""
ERROR_STATUSES = (400, 401, 404, 408, 413, 429, 499, 500, 502, 503)
"""The same; 499: the client went away; 502: engines failed it."""


class _WithoutCreated(Collector):
    """Leaves out when each series began: Prometheus takes these for series of their own."""

    def __init__(self, source: Collector) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            family.samples = [
                sample for sample in family.samples if not sample.name.endswith("_created")
            ]
            if family.samples or not family.name.endswith("_created"):
                yield family


def render_metrics(registry: Collector) -> bytes:
    """Return a registry in Prometheus's text format."""
    return generate_latest(_WithoutCreated(registry))


def buckets_of(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the buckets of a ``HistogramMetricFamily``; ``counts`` has one for +Inf, too."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


class LightHistogram(Collector):
    """Shows one series as a histogram; belongs to one thread.

    For what happens with each token: a histogram and a counter of ``prometheus_client`` took a
    router an eighth of its time for a token.
    """

    def __init__(
        self,
        name: str,
        text: str,
        labels: Mapping[str, str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """``bounds``: the upper ends of the buckets but for the last."""
        self._name, self._text, self._labels = name, text, labels
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def describe(self) -> Iterator[Metric]:
        """Yield the name, under which a registry finds it."""
        yield HistogramMetricFamily(self._name, self._text, labels=list(self._labels))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        buckets = buckets_of(self._bounds, self._counts)
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class LightCounter(Collector):
    """Shows one series as a counter; belongs to one thread."""

    def __init__(
        self, name: str, text: str, labels: Mapping[str, str], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._value = 0.0
        registry.register(self)

    def inc(self, number: float) -> None:
        self._value += number

    def describe(self) -> Iterator[Metric]:
        """Yield the name, under which a registry finds it."""
        yield CounterMetricFamily(self._name, self._text, labels=list(self._labels))

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self._value)
        yield family


class RequestMetrics:
    """Counts what the client of an HTTP process sees: requests, tokens, times.

    ``prefix``: of the names, by the kind of process.
    """

    def __init__(
        self, registry: CollectorRegistry, labels: Mapping[str, str], prefix: str = "pdlaunch_"
    ) -> None:
        names, values = tuple(labels), tuple(labels.values())

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"{prefix}{name}", text, names, registry=registry, buckets=buckets
            ).labels(*values)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"{prefix}{name}", text, (*names, *more), registry=registry)

        self._values = values
        self._finished = counter(
            "request_success", "Finished requests by reason.", "finished_reason"
        )
        self._failed = counter("request_errors", "Refused or failed requests.", "status")
        self.in_flight: Gauge = Gauge(
            f"{prefix}http_requests_in_flight", "Requests being answered.", names, registry=registry
        ).labels(*values)
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Request to first token.", TTFT_BUCKETS_S
        )
        self.inter_token = LightHistogram(
            f"{prefix}inter_token_latency_seconds",
            "Between output tokens.",
            labels,
            INTER_TOKEN_BUCKETS_S,
            registry,
        )
        self.request_time = histogram(
            "e2e_request_latency_seconds", "Request to last token.", REQUEST_BUCKETS_S
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
        self.generation_tokens = LightCounter(
            f"{prefix}generation_tokens", "Output tokens sent to clients.", labels, registry
        )
        for reason in FINISH_REASONS:
            self._finished.labels(*values, reason)
        for status in ERROR_STATUSES:
            self._failed.labels(*values, str(status))

    def finished(self, reason: str) -> None:
        """Count a choice that ended with ``reason``."""
        self._finished.labels(*self._values, reason).inc()

    def failed(self, status: int) -> None:
        """Count a request that was answered with an error; 499: the client went away."""
        self._failed.labels(*self._values, str(status)).inc()


class RequestClock:
    """Measures one HTTP request, and reports to the metrics as tokens come."""

    def __init__(
        self, metrics: RequestMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_at = clock()
        self.first_token_at: float | None = None
        self._last_at: dict[int, float] = {}
        """The instant of the last token, by choice."""

    @property
    def last_token_at(self) -> float:
        """Return the instant of the last token; there has been one."""
        return max(self._last_at.values())

    @property
    def num_choices(self) -> int:
        """Return how many choices have had a token."""
        return len(self._last_at)

    def tokens(self, choice: int, num_tokens: int) -> None:
        """Count new tokens of a choice on their way to the client."""
        if not num_tokens:
            return
        now_at = self._clock()
        last_at = self._last_at.get(choice)
        if last_at is not None:
            # Tokens that come together took the time since the last chunk in equal parts.
            self._metrics.inter_token.observe((now_at - last_at) / num_tokens)
        elif not self._last_at:
            self.first_token_at = now_at
            self._metrics.time_to_first_token.observe(now_at - self._start_at)
        self._last_at[choice] = now_at
        self._metrics.generation_tokens.inc(num_tokens)

    def end(self, num_output_tokens: int) -> None:
        """Count an answer that is out."""
        self._metrics.request_time.observe(self._clock() - self._start_at)
        self._metrics.output_length.observe(num_output_tokens)
