"""Counts how long requests of an engine take, what its steps compute and what its pulls bring."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping

from pdlaunch.engine.request import Request
from pdlaunch.observe.histograms import PULL_HISTOGRAMS, REQUEST_HISTOGRAMS, HistogramFamily
from pdlaunch.protocol.engine import EngineHistograms, HistogramCounts, PullHistograms
from pdlaunch.protocol.transfer import PullFinished


class _Counts:
    """Counts the values of some histograms, which ``by_name`` shows."""

    def __init__(self, families: Mapping[str, HistogramFamily]) -> None:
        self._families = families
        self.by_name = {
            name: HistogramCounts(counts=[0] * (len(family.bounds) + 1))
            for name, family in families.items()
        }

    def observe(self, name: str, value: float) -> None:
        shown = self.by_name[name]
        shown.counts[bisect_left(self._families[name].bounds, value)] += 1
        shown.sum += value


class Histograms:
    """Holds the histograms of an engine; requests carry their instants (``Request.times``).

    It decides nothing: the scheduler goes by tokens and blocks, not by time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = _Counts(REQUEST_HISTOGRAMS)
        self._pulls: dict[tuple[str, str], _Counts] = {}

    def shown(self) -> EngineHistograms:
        """Return the counts as they are now; they change with later observations."""
        pulls = [
            PullHistograms(prefill=prefill, path=path, by_name=counts.by_name)
            for (prefill, path), counts in self._pulls.items()
        ]
        return EngineHistograms(requests=self._requests.by_name, pulls=pulls)

    def arrived(self, request: Request) -> None:
        request.times.arrived_at = self._clock()

    def seated(self, request: Request) -> None:
        """Note that a request enters the batch; again after a preemption, which changes nothing."""
        if request.times.started_at is None:
            request.times.started_at = self._clock()

    def drew_token(self, request: Request) -> None:
        """Note a token that a step has drawn for a request."""
        times = request.times
        times.last_at = self._clock()
        if times.first_at is None:
            times.first_at = times.last_at
        times.num_drawn += 1

    def ended(self, request: Request) -> None:
        """Count a request that has ended; one that never was in the batch took no time here."""
        times, observe = request.times, self._requests.observe
        if times.started_at is None:
            return
        observe("request_queue_time_seconds", times.started_at - times.arrived_at)
        observe("request_num_preemptions", times.num_preemptions)
        num_computed = request.num_prompt_tokens - (request.num_cached_tokens or 0)
        observe("request_prefill_kv_computed_tokens", num_computed)
        if times.first_at is None or times.last_at is None:
            return
        decode_s = times.last_at - times.first_at
        observe("request_prefill_time_seconds", times.first_at - times.started_at)
        observe("request_decode_time_seconds", decode_s)
        observe("request_inference_time_seconds", times.last_at - times.started_at)
        if times.num_drawn > 1:
            observe("request_time_per_output_token_seconds", decode_s / (times.num_drawn - 1))

    def ran_step(self, num_tokens: int) -> None:
        """Count a step that has computed ``num_tokens``; without any it was none."""
        if num_tokens:
            self._requests.observe("iteration_tokens_total", num_tokens)

    def pulled(self, event: PullFinished) -> None:
        """Count a pull that has ended well.

        Engines and paths are those of the registry: no request adds a label.
        """
        counts = self._pulls.setdefault((event.prefill, event.path), _Counts(PULL_HISTOGRAMS))
        counts.observe("kv_pull_seconds", event.seconds)
        counts.observe("kv_pull_bytes", event.num_bytes)
        if read_s := event.read_s or event.seconds:
            counts.observe("kv_pull_bytes_per_second", event.num_bytes / read_s)
