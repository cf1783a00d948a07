"""Counts what the router does, and merges its metrics with every engine's on one page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.observe.metrics import RequestMetrics, render_metrics
from pdlaunch.protocol.control import ListedState, PairReady
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.membership_watch import CanaryOutcome
from pdlaunch.router.policy import Hop

EarlyOutcome = Literal["used", "dropped"]


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
        self._early_decodes = Counter(
            "pdlaunch_router_early_decodes",
            (
                "Decode engines told of a prompt while prefill computed it, by whether their "
                "answer was used."
            ),
            ("outcome",),
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
        self._pairs = Gauge(
            "pdlaunch_pair_gigabytes_per_second",
            "Speed that the handshake has measured between two ranks, over the path in use.",
            ("holder", "puller", "path"),
            registry=registry,
        )

    def show_engines(self, states: Sequence[str]) -> None:
        """Show the present state of each engine."""
        self._engines_ready.set(states.count("ready"))
        for state in get_args(ListedState):
            self._engines.labels(state).set(states.count(state))

    def show_pairs(self, pairs: Sequence[PairReady]) -> None:
        """Show the speed of the pairs that are proven now."""
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

    def sent_canary(self, outcome: CanaryOutcome) -> None:
        self._canaries.labels(outcome).inc()

    def released(self) -> None:
        self._releases.inc()

    def recomputed(self, prefill: str, decode: str) -> None:
        self._recomputes.labels(prefill, decode).inc()

    def lost_stream(self, reason: str) -> None:
        self._lost_streams.labels(reason).inc()

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return render_metrics(self._registry)


logger = logging.getLogger(__name__)


class MetricFamilies:
    """Families by name; what several pages say of one becomes one family."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def add(self, page: str, *, engine: str | None = None) -> None:
        """Add a page in Prometheus's text format, its samples labelled with ``engine``.

        Without an engine of its own no sample can be mistaken for another page's. Raises ValueError
        for a malformed page, of which nothing is added.
        """
        label = {} if engine is None else {"engine": engine}
        for family in list(text_string_to_metric_families(page)):
            known = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            # A family has one type on a page; samples of another type are left out.
            if known.type == family.type:
                known.samples += [
                    sample._replace(labels=sample.labels | label) for sample in family.samples
                ]

    def collect(self) -> Iterator[Metric]:
        """Yield the families, as prometheus_client wants a collector to."""
        return iter(self._families.values())


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
        # Reading a page takes about two milliseconds, in which no answer is streamed.
        await asyncio.sleep(0)
    return render_metrics(families)
