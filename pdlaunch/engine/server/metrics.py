"""Measures one engine: what its server sees, and what its rank 0 reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.engine.server.choice import Choice
from pdlaunch.observe.counters import COUNTERS, HISTOGRAMS
from pdlaunch.observe.metrics import RequestMetrics, buckets_of
from pdlaunch.protocol.engine import EngineStats, HistogramSeries

Shown = tuple[str, str, str, Mapping[str, float]]  # name, text, label, and values by the label's


def _gauges(stats: EngineStats) -> Iterator[Shown]:
    def gauge(name: str, text: str, value: float) -> Shown:
        return name, text, "", {"": value}

    num_used = stats.num_blocks - stats.num_free_blocks
    waiting = {"capacity": stats.num_waiting, "deferred": stats.num_waiting_for_kv}
    num_host, num_used_host = stats.num_host_blocks, stats.num_used_host_blocks
    # fmt: off
    yield gauge("num_requests_running", "Requests in the batch.", stats.num_running)
    yield gauge("num_requests_waiting", "Requests that wait for a place in the batch or KV blocks.",
                sum(waiting.values()))
    yield ("num_requests_waiting_by_reason",
           "The same: for a place (capacity), for KV blocks (deferred).", "reason", waiting)
    yield gauge("num_requests_leased", "Finished prefills that wait for a pull.",
                stats.num_leased_requests)
    yield gauge("kv_blocks", "KV blocks of a rank.", stats.num_blocks)
    yield gauge("kv_blocks_free", "KV blocks that can be allocated.", stats.num_free_blocks)
    yield gauge("kv_blocks_leased", "KV blocks under lease.", stats.num_leased_blocks)
    yield gauge("kv_blocks_quarantined", "KV blocks that a READ may still write to.",
                stats.num_quarantined_blocks)
    yield gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.",
                num_used / max(stats.num_blocks, 1))
    yield gauge("kv_offload_blocks", "Room of the host tier in KV blocks.", num_host)
    yield gauge("kv_offload_blocks_used", "KV blocks in the host tier.", num_used_host)
    yield gauge("kv_offload_jobs", "Copies between device and host in flight.",
                stats.num_offload_jobs)
    yield gauge("kv_offload_usage_perc", "Share of the host tier in use, 0 to 1.",
                num_used_host / max(num_host, 1))
    # fmt: on


def _counters(stats: EngineStats) -> Iterator[Shown]:
    values = {name: dict.fromkeys(known.values or ("",), 0.0) for name, known in COUNTERS.items()}
    for counted, number in stats.counts.items():
        name, _, label = counted.partition("/")
        values[name][label] = number
    for name, known in COUNTERS.items():
        yield name, known.text, known.label, values[name]


class ServerMetrics(Collector):
    """Holds all metrics of an engine's server, in ``registry``; shows the last ``stats``.

    Totals begin again with each rank incarnation, which Prometheus expects.
    """

    def __init__(
        self, registry: CollectorRegistry, *, engine: str, role: str, model_name: str
    ) -> None:
        labels = {"engine": engine, "role": role, "model_name": model_name}
        self.stats = EngineStats()
        self._engine = engine
        self._names, self._values = list(labels), list(labels.values())
        self.registry = registry
        self.requests = RequestMetrics(registry, labels)
        registry.register(self)

    def asked(self, num_prompt_tokens: int) -> None:
        self.requests.prompt_tokens.inc(num_prompt_tokens)
        self.requests.prompt_length.observe(num_prompt_tokens)

    def ended(self, choices: Sequence[Choice], otherwise: str) -> None:
        """Count how the choices have ended: as they say, or else ``otherwise``."""
        for choice in choices:
            self.requests.finished(choice.finish_reason or otherwise)

    def collect(self) -> Iterator[Metric]:
        for kind, rows in (
            (GaugeMetricFamily, _gauges(self.stats)),
            (CounterMetricFamily, _counters(self.stats)),
        ):
            for name, text, label, values in rows:
                names = [*self._names, *filter(None, [label])]
                family = kind(f"pdlaunch_{name}", text, labels=names)
                for value, number in values.items():
                    family.add_metric([*self._values, *filter(None, [value])], number)
                yield family
        for name, known in HISTOGRAMS.items():
            # Of a pull this engine is the decode side.
            names = [*self._names, *known.labels, *(["decode"] if known.labels else [])]
            shown = HistogramMetricFamily(f"pdlaunch_{name}", known.text, labels=names)
            found = [series for series in self.stats.histograms if series.name == name]
            if not found and not known.labels:
                empty = [0] * (len(known.bounds) + 1)
                found = [HistogramSeries(name=name, labels=(), counts=empty)]
            for series in found:
                own = [*self._values, *series.labels, *([self._engine] if known.labels else [])]
                shown.add_metric(own, buckets_of(known.bounds, series.counts), series.sum)
            yield shown
