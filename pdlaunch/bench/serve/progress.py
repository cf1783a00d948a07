"""Tells people how far a benchmark has come."""

from __future__ import annotations

import time
from collections.abc import Callable

ProgressText = Callable[[str], None]


class BenchProgress:
    """Counts requests; says after each how many there are and how long the rest will take."""

    def __init__(
        self, total: int, show: ProgressText, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._start_at = clock()
        self._num_done = 0
        self._label = ""

    def begin(self, label: str) -> None:
        """Name what is measured from now on."""
        if not self._num_done:
            self._start_at = self._clock()
        self._label = label
        self._show(label)

    def one_done(self) -> None:
        """Count a request that has ended, well or not."""
        self._num_done += 1
        took_s = self._clock() - self._start_at
        left_s = took_s / self._num_done * (self._total - self._num_done)
        self._show(
            f"{self._label}; {self._num_done} of {self._total} requests, about "
            f"{duration(left_s)} left"
        )


def duration(seconds: float) -> str:
    """Write a duration for people: 8 s, 3 min 20 s, 2 h 5 min."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole_s} s" if minutes else f"{whole_s} s"
