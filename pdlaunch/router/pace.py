"""Compares how fast engines of a role are with what was expected of them, to find a slow one.

::

    pace     = time that answers took / time that the cost model expected, smoothed
    slowness = pace / pace of the usual engine of the role

What an engine's own costs explain is no slowness: routes by cost take it into account. Where no
costs are told, the expected time is a second for each prompt token or gap: then paces are times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

Measure = Literal["first_token", "gap"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

SLOW_AT = 3.0
"""An engine that is so many times slower than the others of its role is left out."""
SLOW_TRY_S = 5.0
"""Between two requests that are sent to a slow engine, to see whether it has recovered."""
NUM_SAMPLES = 3
"""Answers before which nothing is said of an engine."""
WEIGHT = 0.25
"""Weight of the latest answer: three usual ones make up for an engine that was ten times slower."""
MAX_STEP = math.log(8.0)
"""An answer counts at most as if it were eight times slower or faster than the ones before."""
SHORTEST_S = 1e-4
"""Tokens that came together took no time that could be measured."""
OVERHEAD_S = 0.01
"""Added to both times: what a request takes beside computing says nothing of the engine."""
OVERHEAD_TOKENS = 256
"""The same in prompt tokens, where no costs are told."""
NUM_GAPS = 8
"""Tokens that a stream must have for its gaps to count."""
NUM_WHOLE = 32
"""Tokens of an answer that comes whole for it to count: beside so many gaps its pull counts little.
"""


class Smoothed(msgspec.Struct):
    """Holds the logarithm of a smoothed ratio."""

    value: float = 0.0
    num_samples: int = 0

    def add(self, ratio: float) -> None:
        news = math.log(max(ratio, 1e-9))
        if self.num_samples >= NUM_SAMPLES:
            news = min(max(news, self.value - MAX_STEP), self.value + MAX_STEP)
        weight = max(WEIGHT, 1 / (self.num_samples + 1))
        self.value += weight * (news - self.value)
        self.num_samples += 1


class Pace(msgspec.Struct, kw_only=True):
    """Holds what was measured of one engine."""

    first_token: Smoothed = msgspec.field(default_factory=Smoothed)
    gap: Smoothed = msgspec.field(default_factory=Smoothed)
    next_try_at: float = 0.0
    """Instant from which a slow engine is sent a request again, on the pool's clock."""

    def took(self, measure: Measure, took_s: float, expected: float) -> None:
        """Take how long an answer took, and what was expected of it."""
        if expected > 0:
            self.of(measure).add(max(took_s, SHORTEST_S) / expected)

    def of(self, measure: Measure) -> Smoothed:
        return self.first_token if measure == "first_token" else self.gap


def slowness(paces: Sequence[Pace]) -> list[float]:
    """Return how many times slower each is than the usual one of these; 1 where it is not known.

    Of two usual ones the faster counts: the fastest is never slow, nor are more than half.
    """
    if len(paces) < 2:
        return [1.0] * len(paces)
    usual = {measure: _usual(paces, measure) for measure in MEASURES}
    return [
        max(
            (
                math.exp(smoothed.value - middle)
                for measure, middle in usual.items()
                if (smoothed := pace.of(measure)).num_samples >= NUM_SAMPLES and middle is not None
            ),
            default=1.0,
        )
        for pace in paces
    ]


def _usual(paces: Sequence[Pace], measure: Measure) -> float | None:
    values = [
        smoothed.value
        for pace in paces
        if (smoothed := pace.of(measure)).num_samples >= NUM_SAMPLES
    ]
    return statistics.median_low(values) if len(values) > 1 else None
