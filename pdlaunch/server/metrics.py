"""Measures one engine: what its server sees, and what its rank 0 reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Histogram

from pdlaunch.observe.histograms import CHOICE_BUCKETS, TOKEN_BUCKETS
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.server.choice import Choice
from pdlaunch.server.engine_stats import EngineStatsCollector


class ServerMetrics:
    """Holds all metrics of an engine's server, in ``registry``.

    ``cache_config``: labels of ``cache_config_info``.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        engine: str,
        role: str,
        model_name: str,
        cache_config: Mapping[str, str] | None = None,
    ) -> None:
        labels = {"engine": engine, "role": role, "model_name": model_name}

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"pdlaunch_{name}", text, tuple(labels), registry=registry, buckets=buckets
            ).labels(**labels)

        self.registry = registry
        self.requests = RequestMetrics(registry, labels)
        self.engine = EngineStatsCollector(labels, cache_config or {})
        registry.register(self.engine)
        self._num_choices = histogram(
            "request_params_n", "Choices that a request asks for.", CHOICE_BUCKETS
        )
        self._max_tokens = histogram(
            "request_params_max_tokens", "Output tokens that a choice may have.", TOKEN_BUCKETS
        )
        self._longest = histogram(
            "request_max_num_generation_tokens",
            "Output tokens of a request's longest choice.",
            TOKEN_BUCKETS,
        )

    def asked(self, num_choices: int, choices: Sequence[Choice]) -> None:
        """Count what a request wants: ``num_choices`` for each of its prompts."""
        self._num_choices.observe(num_choices)
        for choice in choices:
            self._max_tokens.observe(choice.request.sampling.max_tokens)

    def ended(self, choices: Sequence[Choice], otherwise: str) -> None:
        """Count how the choices have ended: as they say, or else ``otherwise``."""
        self._longest.observe(max(choice.num_tokens for choice in choices))
        for choice in choices:
            self.requests.finished(choice.finish_reason or otherwise)
