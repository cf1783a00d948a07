"""The router's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from pdlaunch.observe.metrics import RequestMetrics, render_metrics
from pdlaunch.protocol.control import ListedState, PairReady

Hop = Literal["prefill", "decode"]
EarlyOutcome = Literal["used", "dropped"]


class RouterMetrics:
    """What clients see (``requests``) and what the router did with the engines."""

    def __init__(self, served_model_name: str) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = RequestMetrics(
            registry, {"model_name": served_model_name}, prefix="pdlaunch_router_"
        )
        self._engines_ready = Gauge(
            "pdlaunch_router_engines_ready", "Engines that can be given work.", registry=registry
        )
        self._engines = Gauge(
            "pdlaunch_router_engines",
            "Engines by state; failed ones are left alone for a while.",
            ("state",),
            registry=registry,
        )
        self.in_flight = Gauge(
            "pdlaunch_router_requests_in_flight", "Prompts at work.", registry=registry
        )
        self._engine_failures = Counter(
            "pdlaunch_router_engine_failures",
            "Hops that an engine failed.",
            ("engine", "hop"),
            registry=registry,
        )
        self._retries = Counter(
            "pdlaunch_router_retries",
            "Hops asked again, of another engine or of one that is back.",
            ("hop",),
            registry=registry,
        )
        self._fallbacks = Counter(
            "pdlaunch_router_fallbacks",
            "Requests that one engine did alone, though two were wanted.",
            registry=registry,
        )
        self._migrations = Counter(
            "pdlaunch_router_migrations",
            "Answers continued by another engine from the tokens so far.",
            registry=registry,
        )
        self._early_decodes = Counter(
            "pdlaunch_router_early_decodes",
            (
                "Decode engines told of a prompt while prefill computed it: whose answer was used, "
                "or whose was not wanted."
            ),
            ("outcome",),
            registry=registry,
        )
        self._releases = Counter(
            "pdlaunch_router_releases", "Leases ended because nobody pulls.", registry=registry
        )
        self._pairs = Gauge(
            "pdlaunch_pair_gigabytes_per_second",
            "What the handshake has measured between two ranks, over the path that is in use.",
            ("holder", "puller", "path"),
            registry=registry,
        )

    def show_engines(self, states: Sequence[str]) -> None:
        """``states``: of each engine, now."""
        self._engines_ready.set(states.count("ready"))
        for state in get_args(ListedState):
            self._engines.labels(state).set(states.count(state))

    def show_pairs(self, pairs: Sequence[PairReady]) -> None:
        """``pairs``: those that are proven now."""
        self._pairs.clear()
        for pair in pairs:
            if pair.gigabytes_per_s is not None:
                self._pairs.labels(pair.peer, pair.local, pair.path).set(pair.gigabytes_per_s)

    def engine_failed(self, engine: str, hop: Hop) -> None:
        self._engine_failures.labels(engine, hop).inc()

    def retried(self, hop: Hop) -> None:
        self._retries.labels(hop).inc()

    def fell_back(self) -> None:
        self._fallbacks.inc()

    def migrated(self) -> None:
        self._migrations.inc()

    def told_early(self, outcome: EarlyOutcome) -> None:
        self._early_decodes.labels(outcome).inc()

    def released(self) -> None:
        self._releases.inc()

    def text(self) -> bytes:
        """The exposition format."""
        return render_metrics(self._registry)
