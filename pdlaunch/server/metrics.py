"""Measures one engine: what its server sees, and the totals that its rank 0 reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.engine import EngineStats

_GAUGES: Mapping[str, tuple[str, str]] = {
    "num_running": ("num_requests_running", "Requests in the batch."),
    "num_waiting": ("num_requests_waiting", "Requests waiting for a place in the batch."),
    "num_waiting_for_kv": (
        "num_requests_waiting_for_kv",
        "Requests waiting for KV blocks of others.",
    ),
    "num_leased_requests": (
        "num_requests_leased",
        "Finished prefills whose blocks wait for a decode engine.",
    ),
    "num_blocks": ("kv_blocks", "KV blocks of a rank."),
    "num_free_blocks": ("kv_blocks_free", "KV blocks that can be allocated."),
    "num_leased_blocks": ("kv_blocks_leased", "KV blocks under lease."),
    "num_quarantined_blocks": (
        "kv_blocks_quarantined",
        "KV blocks that a READ may still write to.",
    ),
    "num_host_blocks": ("kv_offload_blocks", "Room of the host tier in KV blocks."),
    "num_used_host_blocks": ("kv_offload_blocks_used", "KV blocks in the host tier."),
    "num_offload_jobs": ("kv_offload_jobs", "Copies between device and host in flight."),
}
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "cached_prompt_tokens": ("prefix_cache_hits", "Prompt tokens that were not computed here."),
    "device_hit_tokens": (
        "prefix_cache_device_hits",
        "Prompt tokens found in the KV cache of the device.",
    ),
    "host_hit_tokens": ("prefix_cache_host_hits", "Prompt tokens found in the host tier."),
    "remote_hit_tokens": ("prefix_cache_remote_hits", "Prompt tokens pulled from another engine."),
    "generation_tokens": ("sampled_tokens", "Output tokens drawn by the rank."),
    "preemptions": ("num_preemptions", "Requests that lost their blocks and were computed again."),
    "transfers": ("kv_transfers", "Pulls that ended well."),
    "transfer_bytes": ("kv_transfer_bytes", "Bytes of KV blocks pulled."),
    "transfer_seconds": ("kv_transfer_seconds", "Seconds spent in pulls."),
    "transfer_failures": ("kv_transfer_failures", "Pulls that failed."),
    "pull_retries": ("kv_pull_retries", "READs that were repeated after a failure."),
    "recomputed_requests": (
        "kv_recomputed_requests",
        "Requests whose prompt was recomputed after failed pulls.",
    ),
    "leases_expired": ("kv_leases_expired", "Leases that nobody pulled in time."),
    "late_reads": (
        "kv_late_reads",
        "Pulls whose bytes came after their lease had ended; they were not used.",
    ),
    "verification_failures": (
        "kv_verification_failures",
        "Pulls whose hashes or checksums differed.",
    ),
    "offload_stores": ("kv_offload_stores", "Copies to host memory that have ended."),
    "offload_stored_bytes": ("kv_offload_stored_bytes", "Bytes copied from device to host."),
    "offload_stored_seconds": ("kv_offload_stored_seconds", "Seconds of these copies."),
    "offload_store_failures": ("kv_offload_store_failures", "Copies to host memory that failed."),
    "offload_loads": ("kv_offload_loads", "Copies from host memory that have ended."),
    "offload_loaded_bytes": ("kv_offload_loaded_bytes", "Bytes copied from host to device."),
    "offload_loaded_seconds": ("kv_offload_loaded_seconds", "Seconds of these copies."),
    "offload_load_failures": (
        "kv_offload_load_failures",
        "Copies from host memory that failed; their tokens were computed.",
    ),
    "offload_bad_blocks": (
        "kv_offload_bad_blocks",
        "KV blocks in host memory that were not what was stored there.",
    ),
    "offload_evicted_blocks": (
        "kv_offload_evicted_blocks",
        "KV blocks that left the host tier for others.",
    ),
    "offload_refused_blocks": (
        "kv_offload_refused_blocks",
        "KV blocks not stored for want of room.",
    ),
}


class EngineStatsCollector(Collector):
    """Shows the last ``EngineStats`` as metrics.

    Totals begin again with each rank incarnation, which Prometheus expects.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._names, self._values = list(labels), list(labels.values())
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        for field, (name, text) in _GAUGES.items():
            yield self._sample(
                GaugeMetricFamily(f"pdlaunch_{name}", text, labels=self._names),
                getattr(self.stats, field),
            )
        for field, (name, text) in _COUNTERS.items():
            yield self._sample(
                CounterMetricFamily(f"pdlaunch_{name}", text, labels=self._names),
                getattr(self.stats, field),
            )
        usage = GaugeMetricFamily(
            "pdlaunch_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=self._names
        )
        yield self._sample(
            usage,
            1 - self.stats.num_free_blocks / max(self.stats.num_blocks, 1)
            if self.stats.num_blocks
            else 0,
        )
        usage = GaugeMetricFamily(
            "pdlaunch_kv_offload_usage_perc",
            "Share of the host tier in use, 0 to 1.",
            labels=self._names,
        )
        yield self._sample(
            usage, self.stats.num_used_host_blocks / max(self.stats.num_host_blocks, 1)
        )

    def _sample(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(self._values, value)
        return family


class ServerMetrics:
    """Holds all metrics of an engine's server, in ``registry``."""

    def __init__(
        self, registry: CollectorRegistry, *, engine: str, role: str, model_name: str
    ) -> None:
        labels = {"engine": engine, "role": role, "model_name": model_name}
        self.registry = registry
        self.requests = RequestMetrics(registry, labels)
        self.engine = EngineStatsCollector(labels)
        registry.register(self.engine)
