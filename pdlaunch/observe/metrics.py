"""Defines the Prometheus metrics that the router and the engines' servers share.

Names of engines are vLLM's with the prefix ``pdlaunch_``, those of the router begin with
``pdlaunch_router_``: a request that the router serves is two or more at engines, and no sum may add
them up. Building blocks: label names are fixed at construction, as are their values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

TTFT_BUCKETS_S = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
INTER_TOKEN_BUCKETS_S = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
REQUEST_BUCKETS_S = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
TOKEN_BUCKETS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
)


def render_metrics(registry: Collector) -> bytes:
    """Return the registry, or whatever else collects, in Prometheus's text format."""
    return generate_latest(registry)


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
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between output tokens.", INTER_TOKEN_BUCKETS_S
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
        self.generation_tokens = counter("generation_tokens", "Output tokens sent to clients.")

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
        self._last_at: dict[int, float] = {}

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
            self._metrics.time_to_first_token.observe(now_at - self._start_at)
        self._last_at[choice] = now_at
        self._metrics.generation_tokens.inc(num_tokens)

    def end(self, num_output_tokens: int) -> None:
        """Count an answer that is out."""
        self._metrics.request_time.observe(self._clock() - self._start_at)
        self._metrics.output_length.observe(num_output_tokens)
