"""Counts what the router does, and adds every engine's metrics to its own page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pdlaunch.observe.histograms import INTER_TOKEN_BUCKETS_S
from pdlaunch.observe.metrics import RequestMetrics, render_metrics
from pdlaunch.protocol.control import EndReason, ListedState, PairReady
from pdlaunch.protocol.transfer import join_paths
from pdlaunch.router.continuation import LOST_REASONS
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.health import HealthState
from pdlaunch.router.membership import CanaryOutcome
from pdlaunch.router.metrics_page import MetricFamilies
from pdlaunch.router.policy import Hop

logger = logging.getLogger(__name__)


class RouterMetrics:
    """Counts what clients see (``requests``) and what the router did with the engines."""

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
        self._engine_hosts = Gauge(
            "pdlaunch_router_engine_info",
            "Always 1; where an engine runs, in labels.",
            ("engine", "role", "host"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "pdlaunch_router_requests_in_flight",
            "Prompts that are being answered.",
            registry=registry,
        )
        self._engine_failures = Counter(
            "pdlaunch_router_engine_failures",
            "Requests that an engine failed.",
            ("engine", "hop"),
            registry=registry,
        )
        self._retries = Counter(
            "pdlaunch_router_retries",
            "Requests sent again, to another engine or to one that is back.",
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
        self._health = Gauge(
            "pdlaunch_router_engine_health",
            (
                "1 for the state of each engine's breaker: closed, open (it has failed requests "
                "and gets none), half_open (one is tried)."
            ),
            ("engine", "state"),
            registry=registry,
        )
        self._pair_health = Gauge(
            "pdlaunch_router_pair_health",
            "1 for the state of the breaker of each pair of which a pull has failed lately.",
            ("prefill", "decode", "state"),
            registry=registry,
        )
        self._too_late = Counter(
            "pdlaunch_router_deadlines_refused",
            "Requests refused at once because prompts before them take longer than their deadline.",
            registry=registry,
        )
        self._releases = Counter(
            "pdlaunch_router_releases",
            "Leases ended early because nobody will pull them.",
            registry=registry,
        )
        self._canaries = Counter(
            "pdlaunch_router_canaries",
            "Canaries that a router alone has sent through pairs of engines: proven, or failed.",
            ("outcome",),
            registry=registry,
        )
        self._recomputes = Counter(
            "pdlaunch_router_silent_recomputes",
            "Prompts that decode computed though it was handed their KV blocks.",
            ("prefill", "decode"),
            registry=registry,
        )
        self._lost_streams = Counter(
            "pdlaunch_router_lost_streams",
            "Streams that ended with an error because no other engine can go on with them.",
            ("reason",),
            registry=registry,
        )
        self._routes = Counter(
            "pdlaunch_router_routes",
            (
                "Prompts by the route that was chosen: a pair of engines, or one engine of a role "
                "alone."
            ),
            ("kind",),
            registry=registry,
        )
        self._pairs = Gauge(
            "pdlaunch_pair_bytes_per_second",
            "Speed that the handshake has measured between two ranks, over the path in use.",
            ("prefill", "decode", "holder", "puller", "path"),
            registry=registry,
        )
        self._second_token = Histogram(
            "pdlaunch_pair_second_token_seconds",
            "First to second token that a client was sent, where a pair of engines did the prompt.",
            ("prefill", "decode", "path"),
            registry=registry,
            buckets=INTER_TOKEN_BUCKETS_S,
        )
        self._paths: dict[tuple[str, str], str] = {}
        """The path of each pair of engines."""
        self._ends = _Ends()
        registry.register(self._ends)
        # What has not happened yet is there with 0.
        for reason in LOST_REASONS:
            self._lost_streams.labels(reason)
        for hop in get_args(Hop):
            self._retries.labels(hop)
        for canary in get_args(CanaryOutcome):
            self._canaries.labels(canary)

    def routed(self, kind: str) -> None:
        self._routes.labels(kind).inc()

    def show_engines(self, engines: Mapping[str, str]) -> None:
        """Show the present states of engines, which are by name."""
        states = list(engines.values())
        for engine in engines:
            for hop in get_args(Hop):
                self._engine_failures.labels(engine, hop)
        self._engines_ready.set(states.count("ready"))
        for state in get_args(ListedState):
            self._engines.labels(state).set(states.count(state))

    def show_health(
        self,
        engines: Mapping[str, HealthState],
        pairs: Mapping[tuple[str, str], HealthState],
    ) -> None:
        """Show the states of the breakers of engines, by name, and of pairs."""
        self._health.clear()
        self._pair_health.clear()
        for engine, state in engines.items():
            for each in get_args(HealthState):
                self._health.labels(engine, each).set(each == state)
        for (prefill, decode), pair_state in pairs.items():
            for each_state in get_args(HealthState):
                self._pair_health.labels(prefill, decode, each_state).set(each_state == pair_state)

    def refused_deadline(self) -> None:
        self._too_late.inc()

    def show_hosts(self, engines: Sequence[Engine]) -> None:
        """Show where engines run now."""
        self._engine_hosts.clear()
        for engine in engines:
            self._engine_hosts.labels(engine.name, engine.role or "", engine.place).set(1)

    def show_pairs(self, pairs: Sequence[PairReady]) -> None:
        """Show the speed of the pairs that are proven now."""
        self._pairs.clear()
        paths: dict[tuple[str, str], list[str]] = {}
        for pair in pairs:
            # Names of ranks begin with that of their engine.
            prefill, decode = (name.partition("/")[0] for name in (pair.peer, pair.local))
            paths.setdefault((prefill, decode), []).append(pair.path)
            self._recomputes.labels(prefill, decode)
            if pair.gigabytes_per_s is not None:
                self._pairs.labels(prefill, decode, pair.peer, pair.local, pair.path).set(
                    pair.gigabytes_per_s * 1e9
                )
        self._paths = {pair: join_paths(found) for pair, found in paths.items()}

    def show_ends(self, ends: Mapping[str, Mapping[EndReason, int]]) -> None:
        """Show how often processes of this launch have ended, by name and reason."""
        self._ends.counts = ends

    def second_token(self, prefill: str, decode: str, seconds: float) -> None:
        """Count the time between the first two tokens that a client was sent."""
        path = self._paths.get((prefill, decode), "unknown")
        self._second_token.labels(prefill, decode, path).observe(seconds)

    def engine_failed(self, engine: str, hop: Hop) -> None:
        self._engine_failures.labels(engine, hop).inc()

    def retried(self, hop: Hop) -> None:
        self._retries.labels(hop).inc()

    def fell_back(self) -> None:
        self._fallbacks.inc()

    def migrated(self) -> None:
        self._migrations.inc()

    def sent_canary(self, outcome: CanaryOutcome) -> None:
        self._canaries.labels(outcome).inc()

    def released(self) -> None:
        self._releases.inc()

    def recomputed(self, prefill: str, decode: str) -> None:
        self._recomputes.labels(prefill, decode).inc()

    def lost_stream(self, reason: str) -> None:
        self._lost_streams.labels(reason).inc()

    def samples(self, names: Collection[str]) -> Iterator[Sample]:
        """Yield the samples of these names as they are now."""
        for metric in self._registry.restricted_registry(list(names)).collect():
            yield from metric.samples

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return render_metrics(self._registry)


class _Ends(Collector):
    """Shows what the supervisor counts; begins again with each launch."""

    def __init__(self) -> None:
        self.counts: Mapping[str, Mapping[EndReason, int]] = {}

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "pdlaunch_process_ends",
            "Processes that ended while the launch served: they died, or hung and were killed.",
            labels=["process", "reason"],
        )
        for process, counts in self.counts.items():
            for reason, count in counts.items():
                family.add_metric([process, reason], count)
        yield family


async def scrape(own_page: bytes, client: EngineClient, engines: Collection[Engine]) -> bytes:
    """Return ``own_page`` merged with the pages of all engines.

    An engine that does not answer in time is missing.
    """
    families = MetricFamilies()
    families.add(own_page.decode())
    pages = await asyncio.gather(*(client.read_metrics(engine) for engine in engines))
    for engine, page in zip(engines, pages, strict=True):
        try:
            families.add(page or "", engine=engine.name)
        except ValueError as error:
            logger.warning("%s: its metrics cannot be read: %s", engine.name, error)
        # Reading a page takes a millisecond or two, in which no answer is streamed.
        await asyncio.sleep(0)
    return families.page().encode()
