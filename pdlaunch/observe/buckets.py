"""Buckets of histograms.

Where vLLM has a histogram of the same meaning, its buckets are among these: quantiles over engines
of both kinds add up. There are more at the short end, where the hand-over of a prompt takes place.
"""

from __future__ import annotations

from collections.abc import Iterator


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
# fmt: on
TOKEN_BUCKETS = tuple(scaled((1, 2, 5), 1, 200_000))
