"""Counts how long requests of an engine take, what its steps compute and what its pulls bring."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from pdlaunch.engine.request import Request
from pdlaunch.observe.histograms import HISTOGRAMS
from pdlaunch.protocol.engine import HistogramSeries
from pdlaunch.protocol.transfer import PullFinished


class Histograms:
    """Holds the histograms of an engine; requests carry their instants."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._series: dict[tuple[str, tuple[str, ...]], HistogramSeries] = {}

    def shown(self) -> list[HistogramSeries]:
        """Return the counts as they are now; they change with later observations."""
        return list(self._series.values())

    def arrived(self, request: Request) -> None:
        request.arrived_at = self._clock()

    def seated(self, request: Request) -> None:
        # A second time, after a preemption, changes nothing.
        if request.started_at is None:
            request.started_at = self._clock()

    def drew_token(self, request: Request) -> None:
        request.last_at = self._clock()
        if request.first_at is None:
            request.first_at = request.last_at
        request.num_drawn += 1

    def ended(self, request: Request) -> None:
        """Count a request that has ended; one that never was in the batch took no time here."""
        start_at, first_at, last_at = request.started_at, request.first_at, request.last_at
        if start_at is None:
            return
        num_computed = request.num_prompt_tokens - (request.num_cached_tokens or 0)
        self.observe("request_queue_time_seconds", start_at - request.arrived_at)
        self.observe("request_num_preemptions", request.num_preemptions)
        self.observe("request_prefill_kv_computed_tokens", num_computed)
        if first_at is None:
            return
        self.observe("request_prefill_time_seconds", first_at - start_at)
        self.observe("request_decode_time_seconds", last_at - first_at)
        self.observe("request_inference_time_seconds", last_at - start_at)
        if request.num_drawn > 1:
            per_token_s = (last_at - first_at) / (request.num_drawn - 1)
            self.observe("request_time_per_output_token_seconds", per_token_s)

    def pulled(self, event: PullFinished) -> None:
        """Count a pull that has ended well, by engine and path as in the registry."""
        labels = (event.prefill, event.path)
        self.observe("kv_pull_seconds", event.seconds, labels)
        self.observe("kv_pull_bytes", event.num_bytes, labels)
        if read_s := event.read_s or event.seconds:
            self.observe("kv_pull_bytes_per_second", event.num_bytes / read_s, labels)

    def observe(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        bounds = HISTOGRAMS[name].bounds
        series = self._series.get((name, labels))
        if series is None:
            series = HistogramSeries(name=name, labels=labels, counts=[0] * (len(bounds) + 1))
            self._series[name, labels] = series
        series.counts[bisect_left(bounds, value)] += 1
        series.sum += value
