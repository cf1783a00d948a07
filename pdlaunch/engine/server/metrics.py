"""Measures one engine: what its server sees, and what its rank 0 reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.engine.server.choice import Choice
from pdlaunch.observe.histograms import (
    CHOICE_BUCKETS,
    PULL_HISTOGRAMS,
    REQUEST_HISTOGRAMS,
    TOKEN_BUCKETS,
    HistogramFamily,
)
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.engine import EngineHistograms, EngineStats, HistogramCounts

# Fields of EngineStats, with what follows ``pdlaunch_`` in the metric's name, vLLM's word where it
# has one. Counters get ``_total`` when they are shown. What follows from several fields is made in
# ``_derived``; a field that is in none of them is sent and never shown.
_GAUGES: Mapping[str, tuple[str, str]] = {
    "num_running": ("num_requests_running", "Requests in the batch."),
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
    "device_hit_tokens": (
        "prefix_cache_hits",
        "Prompt tokens found in the KV cache of the device.",
    ),
    "cached_prompt_tokens": ("prompt_tokens_cached", "Prompt tokens that were not computed here."),
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


class _Derived(NamedTuple):
    """Describes a metric that follows from several fields."""

    kind: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    text: str
    values: Mapping[tuple[str, ...], float]
    """Values by those of ``labels``."""
    labels: tuple[str, ...] = ()


def _derived(stats: EngineStats) -> Iterator[_Derived]:
    device, host, remote = stats.device_hit_tokens, stats.host_hit_tokens, stats.remote_hit_tokens
    num_used = stats.num_blocks - stats.num_free_blocks
    yield _Derived(
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
        {(): num_used / max(stats.num_blocks, 1)},
    )
    yield _Derived(
        GaugeMetricFamily,
        "kv_offload_usage_perc",
        "Share of the host tier in use, 0 to 1.",
        {(): stats.num_used_host_blocks / max(stats.num_host_blocks, 1)},
    )
    yield _Derived(
        GaugeMetricFamily,
        "num_requests_waiting",
        "Requests waiting for a place in the batch, or for KV blocks.",
        {(): stats.num_waiting + stats.num_waiting_for_kv},
    )
    yield _Derived(
        GaugeMetricFamily,
        "num_requests_waiting_by_reason",
        "The same: for a place in the batch (capacity), or for KV blocks of another engine or of "
        "the host (deferred).",
        {("capacity",): stats.num_waiting, ("deferred",): stats.num_waiting_for_kv},
        ("reason",),
    )
    yield _Derived(
        CounterMetricFamily,
        "external_prefix_cache_queries",
        "Prompt tokens that the KV cache of the device lacked.",
        {(): stats.prompt_tokens - device},
    )
    yield _Derived(
        CounterMetricFamily,
        "external_prefix_cache_hits",
        "Of these, tokens from the host tier or pulled from another engine.",
        {(): host + remote},
    )
    yield _Derived(
        CounterMetricFamily,
        "prompt_tokens_by_source",
        "Prompt tokens by where their KV came from.",
        {
            ("local_compute",): stats.prompt_tokens - stats.cached_prompt_tokens,
            ("local_cache_hit",): device,
            ("external_kv_transfer",): host + remote,
        },
        ("source",),
    )
    yield _Derived(
        CounterMetricFamily,
        "prompt_tokens_cached_by_source",
        "Prompt tokens that were not computed here, by what had them: the device, host memory, "
        "another engine (p2p).",
        {("device",): device, ("host",): host, ("p2p",): remote},
        ("source",),
    )


class EngineStatsCollector(Collector):
    """Shows the last ``EngineStats`` as metrics.

    Totals begin again with each rank incarnation, which Prometheus expects. ``cache_config``: what
    is known of the KV cache before a rank has said anything.
    """

    def __init__(self, labels: Mapping[str, str], cache_config: Mapping[str, str]) -> None:
        self._names, self._values = list(labels), list(labels.values())
        self._engine = labels["engine"]
        self._cache_config = cache_config
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        for field, (name, text) in _GAUGES.items():
            value = getattr(self.stats, field)
            yield self._family(_Derived(GaugeMetricFamily, name, text, {(): value}))
        for field, (name, text) in _COUNTERS.items():
            value = getattr(self.stats, field)
            yield self._family(_Derived(CounterMetricFamily, name, text, {(): value}))
        for derived in _derived(self.stats):
            yield self._family(derived)
        yield self._cache_config_info()
        yield from self._histograms(self.stats.histograms or EngineHistograms())

    def _family(self, derived: _Derived) -> Metric:
        family = derived.kind(
            f"pdlaunch_{derived.name}", derived.text, labels=[*self._names, *derived.labels]
        )
        for labels, value in derived.values.items():
            family.add_metric([*self._values, *labels], value)
        return family

    def _cache_config_info(self) -> Metric:
        """Return a gauge that is always 1, whose labels say what the KV cache is like."""
        config = {**self._cache_config, "num_gpu_blocks": str(self.stats.num_blocks)}
        family = GaugeMetricFamily(
            "pdlaunch_cache_config_info",
            "The KV cache of a rank, in labels; num_gpu_blocks are the blocks of any device.",
            labels=[*self._names, *config],
        )
        family.add_metric([*self._values, *config.values()], 1)
        return family

    def _histograms(self, histograms: EngineHistograms) -> Iterator[Metric]:
        for name, known in REQUEST_HISTOGRAMS.items():
            shown = HistogramMetricFamily(f"pdlaunch_{name}", known.text, labels=self._names)
            _add(shown, self._values, known, histograms.requests.get(name))
            yield shown
        for name, known in PULL_HISTOGRAMS.items():
            names = [*self._names, "prefill", "decode", "path"]
            shown = HistogramMetricFamily(f"pdlaunch_{name}", known.text, labels=names)
            for pulls in histograms.pulls:
                pair = (pulls.prefill, self._engine, pulls.path)
                _add(shown, [*self._values, *pair], known, pulls.by_name.get(name))
            yield shown


def _add(
    shown: HistogramMetricFamily,
    labels: list[str],
    known: HistogramFamily,
    found: HistogramCounts | None,
) -> None:
    """Add a histogram; one that no rank has reported is empty."""
    counts = found or HistogramCounts(counts=[0] * (len(known.bounds) + 1))
    bounds = [*(str(float(bound)) for bound in known.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(counts.counts), strict=True))
    shown.add_metric(labels, buckets, counts.sum)
