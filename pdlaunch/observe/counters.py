"""Defines the counters and histograms that rank 0 updates and its server exports, and all buckets.

If vLLM has a histogram of the same meaning, its bucket bounds are included here, so quantiles over
engines of both kinds can be computed. More bounds at the short end resolve prompt hand-overs.
"""

from collections.abc import Mapping
from typing import NamedTuple


class CounterFamily(NamedTuple):
    """Describes one counter. With a ``label``, each label value is counted as ``NAME/VALUE``."""

    text: str
    label: str = ""
    values: tuple[str, ...] = ()  # label values that are exported at 0; others once they occur


class HistogramFamily(NamedTuple):
    """Describes one histogram; ``bounds`` are the upper bounds of its buckets, without +Inf."""

    bounds: tuple[float, ...]
    text: str
    labels: tuple[str, ...] = ()  # in addition to the engine's labels


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
TOKEN_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))[:-1]
STEP_TOKEN_BUCKETS = (1, *(2**power for power in range(3, 15)))
PULL_BUCKETS_BYTES = tuple(4**power for power in range(6, 19))  # 4 KiB to 64 GiB
# 10 MB/s to 1 TB/s
PULL_BUCKETS_BYTES_PER_S = (
    *(digit * 10**power for power in range(7, 12) for digit in (1, 2, 5)),
    10**12,
)

_PULL = ("prefill", "path")
_MANY = {
    "request_queue_time_seconds": "Arrival to the first step, including the pull of KV blocks.",
    "request_prefill_time_seconds": "First step to the first token sampled here.",
    "request_decode_time_seconds": "First to last token sampled here; 0 if there is only one.",
    "request_inference_time_seconds": "First step to the last token sampled here.",
}
# Histograms that rank 0 of an engine updates, by name without prefix
HISTOGRAMS: Mapping[str, HistogramFamily] = {
    **{name: HistogramFamily(REQUEST_BUCKETS_S, text) for name, text in _MANY.items()},
    "request_time_per_output_token_seconds": HistogramFamily(
        INTER_TOKEN_BUCKETS_S, "Mean time between the tokens sampled here, of two or more."
    ),
    # This is vLLM's name, although only names of counters should end in ``_total``.
    "iteration_tokens_total": HistogramFamily(STEP_TOKEN_BUCKETS, "Tokens that a step computes."),
    "kv_pull_seconds": HistogramFamily(
        PULL_BUCKETS_S, "Successful pulls, from lease to proof.", _PULL
    ),
    "kv_pull_bytes": HistogramFamily(PULL_BUCKETS_BYTES, "Bytes of KV blocks of a pull.", _PULL),
    "kv_pull_bytes_per_second": HistogramFamily(
        PULL_BUCKETS_BYTES_PER_S, "Speed of the READs of a pull, without messages and proof.", _PULL
    ),
}
# fmt: off
# Counters of rank 0, by name without prefix; vLLM's name if vLLM has the counter
COUNTERS: Mapping[str, CounterFamily] = {
    "prefix_cache_queries": CounterFamily("Prompt tokens looked up in the cache."),
    "prefix_cache_hits": CounterFamily("Prompt tokens found in the device's cache."),
    "external_prefix_cache_queries": CounterFamily(
        "Prompt tokens not found in the device's cache."),
    "external_prefix_cache_hits": CounterFamily(
        "Prompt tokens found in the host tier or at another engine."),
    "prompt_tokens_cached": CounterFamily("Prompt tokens that were not computed here."),
    "prompt_tokens_by_source": CounterFamily(
        "Prompt tokens by where their KV came from.",
        "source", ("local_compute", "local_cache_hit", "external_kv_transfer")),
    "prompt_tokens_cached_by_source": CounterFamily(
        "Cached prompt tokens by source (p2p: from peers).", "source", ("device", "host", "p2p")),
    "sampled_tokens": CounterFamily("Output tokens sampled by the rank."),
    "num_preemptions": CounterFamily("Requests that lost their blocks."),
    "kv_transfers": CounterFamily("Pulls that succeeded."),
    "kv_transfer_bytes": CounterFamily("Bytes of KV blocks pulled."),
    "kv_transfer_seconds": CounterFamily("Seconds spent in pulls."),
    "kv_transfer_failures": CounterFamily("Pulls that failed."),
    "kv_pull_retries": CounterFamily("READs that were repeated after a failure."),
    "kv_recomputed_requests": CounterFamily("Requests recomputed after failed pulls."),
    "kv_leases_expired": CounterFamily("Leases that no engine pulled in time."),
    "kv_late_reads": CounterFamily("Pulls whose lease ended before their proof; unused."),
    "kv_verification_failures": CounterFamily("Pulls whose hashes or checksums differed."),
    "kv_offload_stored_bytes": CounterFamily("Bytes copied from device to host."),
    "kv_offload_store_failures": CounterFamily("Copies to host memory that failed."),
    "kv_offload_loaded_bytes": CounterFamily("Bytes copied from host to device."),
    "kv_offload_load_failures": CounterFamily("Copies from host memory that failed."),
    "kv_offload_bad_blocks": CounterFamily("Host blocks whose content had changed."),
    "kv_offload_evicted_blocks": CounterFamily("KV blocks evicted from the host tier."),
}
