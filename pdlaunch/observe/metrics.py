"""Defines the Prometheus metrics that the router and the engines' servers share.

Names of engines are vLLM's with the prefix ``pdlaunch_``, those of the router begin with
``pdlaunch_router_``: a request that the router serves is two or more at engines, and no sum may add
them up. Building blocks: label names are fixed at construction, as are their values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.observe.histograms import (
    INTER_TOKEN_BUCKETS_S,
    REQUEST_BUCKETS_S,
    TOKEN_BUCKETS,
    TTFT_BUCKETS_S,
)
from pdlaunch.observe.light_metrics import LightCounter, LightHistogram

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")
"""They are shown from the start, others once they occur."""
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
    """Return the registry, or whatever else collects, in Prometheus's text format.

    No series tells when another one was created.
    """
    return generate_latest(_WithoutCreated(registry))


class RequestMetrics:
    """Counts what the client of an HTTP process sees: requests, tokens, times.

    ``prefix``: of the names, by the kind of process.
    """

    def __init__(
        self, registry: CollectorRegistry, labels: Mapping[str, str], prefix: str = "pdlaunch_"
    ) -> None:
        names, values = tuple(labels), tuple(labels.values())

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"{prefix}{name}", text, names, registry=registry, buckets=buckets
            ).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"{prefix}{name}", text, names, registry=registry).labels(*values)

        self._values = values
        self._finished = Counter(
            f"{prefix}request_success",
            "Finished requests by reason.",
            (*names, "finished_reason"),
            registry=registry,
        )
        self._failed = Counter(
            f"{prefix}request_errors",
            "Refused or failed requests.",
            (*names, "status"),
            registry=registry,
        )
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
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.")
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
    """Measures one HTTP request, and reports to the metrics as tokens come.

    ``clock`` counts seconds.
    """

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

    def restart(self) -> None:
        """Start anew: only now this engine's work begins."""
        self._start_at = self._clock()

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
