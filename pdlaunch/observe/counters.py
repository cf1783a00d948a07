"""Names the counters and histograms that rank 0 counts and its server shows, and all buckets.

Where vLLM has a histogram of the same meaning, its buckets are among these: quantiles over engines
of both kinds add up. There are more at the short end, where the hand-over of a prompt takes place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class CounterFamily(NamedTuple):
    """Describes one counter; those with a ``label`` are counted as ``NAME/VALUE``."""

    text: str
    label: str = ""
    values: tuple[str, ...] = ()  # of the label that are shown from the start; others once counted


class HistogramFamily(NamedTuple):
    """Describes one histogram; ``bounds`` are the upper ends of its buckets but for the last."""

    bounds: tuple[float, ...]
    text: str
    labels: tuple[str, ...] = ()  # besides those of the engine


def scaled(mantissas: tuple[float, ...], first: float, last: float) -> Iterator[float]:
    """Yield the mantissas times powers of ten, from ``first`` to ``last``."""
    scale = first
    while scale <= last:
        yield from (value for mantissa in mantissas if (value := mantissa * scale) <= last)
        scale *= 10


# fmt: off
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
INTER_TOKEN_BUCKETS_S = (
    0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
    20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
PULL_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5,
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)
# fmt: on
TOKEN_BUCKETS = tuple(scaled((1, 2, 5), 1, 200_000))
STEP_TOKEN_BUCKETS = (1, *(2**power for power in range(3, 15)))
PULL_BUCKETS_BYTES = tuple(4**power for power in range(6, 19))  # 4 KiB to 64 GiB
# 10 MB/s to 1 TB/s
PULL_BUCKETS_BYTES_PER_S = tuple(scaled((1, 2, 5), 10_000_000, 1_000_000_000_000))

_PULL = ("prefill", "path")
_MANY = {
    "request_queue_time_seconds": "Arrival to the first step, the pull of its KV blocks included.",
    "request_prefill_time_seconds": "First step to the first token drawn here.",
    "request_decode_time_seconds": "First to last token drawn here; 0 if there is only one.",
    "request_inference_time_seconds": "First step to the last token drawn here.",
}
# Histograms that an engine's rank 0 counts, by name without prefix
HISTOGRAMS: Mapping[str, HistogramFamily] = {
    **{name: HistogramFamily(REQUEST_BUCKETS_S, text) for name, text in _MANY.items()},
    "request_time_per_output_token_seconds": HistogramFamily(
        INTER_TOKEN_BUCKETS_S, "Mean time between the tokens drawn here, of two or more."
    ),
    # A name of vLLM's: elsewhere names of counters alone end like this.
    "iteration_tokens_total": HistogramFamily(STEP_TOKEN_BUCKETS, "Tokens that a step computes."),
    "kv_pull_seconds": HistogramFamily(
        PULL_BUCKETS_S, "Pulls that ended well: from lease to proof.", _PULL
    ),
    "kv_pull_bytes": HistogramFamily(PULL_BUCKETS_BYTES, "Bytes of KV blocks of a pull.", _PULL),
    "kv_pull_bytes_per_second": HistogramFamily(
        PULL_BUCKETS_BYTES_PER_S,
        "Speed of the READs of a pull, without questions and proof.",
        _PULL,
    ),
}
# fmt: off
# Counters of rank 0, by name without prefix; vLLM's names where it has them
COUNTERS: Mapping[str, CounterFamily] = {
    "prefix_cache_queries": CounterFamily("Prompt tokens looked up in the cache."),
    "prefix_cache_hits": CounterFamily("Prompt tokens found in the device's cache."),
    "external_prefix_cache_queries": CounterFamily(
        "Prompt tokens that the KV cache of the device lacked."),
    "external_prefix_cache_hits": CounterFamily(
        "Of these, tokens of the host tier or of another engine."),
    "prompt_tokens_cached": CounterFamily("Prompt tokens that were not computed here."),
    "prompt_tokens_by_source": CounterFamily(
        "Prompt tokens by where their KV came from.",
        "source", ("local_compute", "local_cache_hit", "external_kv_transfer")),
    "prompt_tokens_cached_by_source": CounterFamily(
        "Cached prompt tokens: of device, host, peers (p2p).", "source", ("device", "host", "p2p")),
    "sampled_tokens": CounterFamily("Output tokens drawn by the rank."),
    "num_preemptions": CounterFamily("Requests that lost their blocks."),
    "kv_transfers": CounterFamily("Pulls that ended well."),
    "kv_transfer_bytes": CounterFamily("Bytes of KV blocks pulled."),
    "kv_transfer_seconds": CounterFamily("Seconds spent in pulls."),
    "kv_transfer_failures": CounterFamily("Pulls that failed."),
    "kv_pull_retries": CounterFamily("READs that were repeated after a failure."),
    "kv_recomputed_requests": CounterFamily("Requests recomputed after failed pulls."),
    "kv_leases_expired": CounterFamily("Leases that nobody pulled in time."),
    "kv_late_reads": CounterFamily("Pulls after their lease; they were not used."),
    "kv_verification_failures": CounterFamily("Pulls whose hashes or checksums differed."),
    "kv_offload_stored_bytes": CounterFamily("Bytes copied from device to host."),
    "kv_offload_store_failures": CounterFamily("Copies to host memory that failed."),
    "kv_offload_loaded_bytes": CounterFamily("Bytes copied from host to device."),
    "kv_offload_load_failures": CounterFamily("Copies from host memory that failed."),
    "kv_offload_bad_blocks": CounterFamily("Host blocks that were not what was stored."),
    "kv_offload_evicted_blocks": CounterFamily("KV blocks that left the host tier."),
}
