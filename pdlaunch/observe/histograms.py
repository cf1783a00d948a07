"""Names the histograms that ranks count and servers show, with their buckets.

Where vLLM has a histogram of the same meaning, its buckets are among these: quantiles over engines
of both kinds add up. There are more at the short end, where the hand-over of a prompt takes place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class HistogramFamily(NamedTuple):
    """Describes one histogram; ``bounds`` are the upper ends of its buckets but for the last."""

    bounds: tuple[float, ...]
    text: str
    labels: tuple[str, ...] = ()  # besides those of the engine


def _scaled(mantissas: tuple[float, ...], first: float, last: float) -> Iterator[float]:
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
TOKEN_BUCKETS = tuple(_scaled((1, 2, 5), 1, 200_000))
STEP_TOKEN_BUCKETS = (1, *(2**power for power in range(3, 15)))
PULL_BUCKETS_BYTES = tuple(4**power for power in range(6, 19))  # 4 KiB to 64 GiB
PULL_BUCKETS_BYTES_PER_S = tuple(_scaled((1, 2, 5), 10_000_000, 1_000_000_000_000))
"""10 MB/s to 1 TB/s."""

_PULL = ("prefill", "path")
_MANY = {
    "request_queue_time_seconds": "Arrival to the first step, the pull of its KV blocks included.",
    "request_prefill_time_seconds": "First step to the first token drawn here.",
    "request_decode_time_seconds": "First to last token drawn here; 0 where there is one.",
    "request_inference_time_seconds": "First step to the last token drawn here.",
}
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
"""Histograms that an engine's rank 0 counts, by name without prefix."""
