"""Measures one engine: what its server sees, and what its rank 0 reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.engine.server.choice import Choice
from pdlaunch.observe.histograms import HISTOGRAMS
from pdlaunch.observe.metrics import RequestMetrics, buckets_of
from pdlaunch.protocol.engine import EngineStats, HistogramSeries

_STATS = """
gauge   num_running            num_requests_running     Requests in the batch.
gauge   num_leased_requests    num_requests_leased      Finished prefills that wait for a pull.
gauge   num_blocks             kv_blocks                KV blocks of a rank.
gauge   num_free_blocks        kv_blocks_free           KV blocks that can be allocated.
gauge   num_leased_blocks      kv_blocks_leased         KV blocks under lease.
gauge   num_quarantined_blocks kv_blocks_quarantined    KV blocks that a READ may still write to.
gauge   num_host_blocks        kv_offload_blocks        Room of the host tier in KV blocks.
gauge   num_used_host_blocks   kv_offload_blocks_used   KV blocks in the host tier.
gauge   num_offload_jobs       kv_offload_jobs          Copies between device and host in flight.
counter prompt_tokens          prefix_cache_queries     Prompt tokens looked up in the cache.
counter device_hit_tokens      prefix_cache_hits        Prompt tokens found in the device's cache.
counter generation_tokens      sampled_tokens           Output tokens drawn by the rank.
counter preemptions            num_preemptions          Requests that lost their blocks.
counter transfers              kv_transfers             Pulls that ended well.
counter transfer_bytes         kv_transfer_bytes        Bytes of KV blocks pulled.
counter transfer_seconds       kv_transfer_seconds      Seconds spent in pulls.
counter transfer_failures      kv_transfer_failures     Pulls that failed.
counter pull_retries           kv_pull_retries          READs that were repeated after a failure.
counter recomputed_requests    kv_recomputed_requests   Requests recomputed after failed pulls.
counter leases_expired         kv_leases_expired        Leases that nobody pulled in time.
counter late_reads             kv_late_reads            Pulls after their lease; they were not used.
counter verification_failures  kv_verification_failures Pulls whose hashes or checksums differed.
counter offload_stored_bytes   kv_offload_stored_bytes  Bytes copied from device to host.
counter offload_store_failures kv_offload_store_failures Copies to host memory that failed.
counter offload_loaded_bytes   kv_offload_loaded_bytes  Bytes copied from host to device.
counter offload_load_failures  kv_offload_load_failures Copies from host memory that failed.
counter offload_bad_blocks     kv_offload_bad_blocks    Host blocks that were not what was stored.
counter offload_evicted_blocks kv_offload_evicted_blocks KV blocks that left the host tier.
gauge   - kv_cache_usage_perc            Share of KV blocks in use, 0 to 1.
gauge   - kv_offload_usage_perc          Share of the host tier in use, 0 to 1.
gauge   - num_requests_waiting           Requests that wait for a place in the batch or KV blocks.
gauge   - num_requests_waiting_by_reason The same: for a place (capacity), for KV blocks (deferred).
counter - prompt_tokens_cached           Prompt tokens that were not computed here.
counter - external_prefix_cache_queries  Prompt tokens that the KV cache of the device lacked.
counter - external_prefix_cache_hits     Of these, tokens of the host tier or of another engine.
counter - prompt_tokens_by_source        Prompt tokens by where their KV came from.
counter - prompt_tokens_cached_by_source Cached prompt tokens: of device, host, peers (p2p).
"""
"""Fields of ``EngineStats``, each with what follows ``pdlaunch_`` in the metric's name, vLLM's word
where it has one; ``-`` follows from several. Counters get ``_total`` when they are shown.
"""
_KINDS = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


_LABELS = {
    "num_requests_waiting_by_reason": "reason",
    "prompt_tokens_by_source": "source",
    "prompt_tokens_cached_by_source": "source",
}


def _values(stats: EngineStats) -> dict[str, float | Mapping[str, float]]:
    """Return the values of the table's fields, and of its derived metrics, some by label."""
    device, host, remote = stats.device_hit_tokens, stats.host_hit_tokens, stats.remote_hit_tokens
    num_used = stats.num_blocks - stats.num_free_blocks
    return msgspec.structs.asdict(stats) | {
        "kv_cache_usage_perc": num_used / max(stats.num_blocks, 1),
        "kv_offload_usage_perc": stats.num_used_host_blocks / max(stats.num_host_blocks, 1),
        "num_requests_waiting": stats.num_waiting + stats.num_waiting_for_kv,
        "num_requests_waiting_by_reason": {
            "capacity": stats.num_waiting,
            "deferred": stats.num_waiting_for_kv,
        },
        "prompt_tokens_cached": device + host + remote,
        "external_prefix_cache_queries": stats.prompt_tokens - device,
        "external_prefix_cache_hits": host + remote,
        "prompt_tokens_by_source": {
            "local_compute": stats.prompt_tokens - device - host - remote,
            "local_cache_hit": device,
            "external_kv_transfer": host + remote,
        },
        "prompt_tokens_cached_by_source": {"device": device, "host": host, "p2p": remote},
    }


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
        values = _values(self.stats)
        for row in _STATS.strip().splitlines():
            kind, field, name, text = row.split(maxsplit=3)
            value = values[name if field == "-" else field]
            names = [*self._names, _LABELS[name]] if name in _LABELS else self._names
            family = _KINDS[kind](f"pdlaunch_{name}", text, labels=names)
            for label, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                family.add_metric([*self._values, label] if label else self._values, number)
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
