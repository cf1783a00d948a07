"""Tells what a stream at a prefill engine has to reckon with: the prompts that are yet to come."""

from __future__ import annotations

from collections.abc import Sequence

from pdlaunch.router.cost_model import Load
from pdlaunch.router.engine import EngineKey


class Exposure:
    """Counts what prompts do to streams that are at the same engine, as they come now.

    ::

        in bursts     tokens | | |            | | | | | |       one late token, for all prompts
        one by one    tokens | |  |  | |  | |  | |  |  |        as many late ones as prompts

    Where requests come in bursts and end together, streams meet hardly any, and may be anywhere.
    Where they come one by one, prompts at a prefill engine delay its streams and are delayed by
    them.
    """

    FORGETS = 1 / 128
    """Share of what was counted that each request lets go: a load that changes is known after about
    a hundred requests. In the simulator four times as much changes nothing.
    """
    MOST_LATE = 0.03
    """Share of the tokens that may be late: half of the streams are at decode engines, so that the
    percentiles which people look at stay. Bursts were found to make 0.005, others 0.05 and more:
    what lies in between makes no difference.
    """
    FIRST_MET, FIRST_LATE = 0.25, 0.1
    """They hold until streams have lasted some time: a pair is what was asked for, so a new
    launch is taken for one whose requests come one by one. Any values above ``MOST_LATE`` do.
    """
    FIRST_LASTS_S = 2.0
    """For so long: a burst that lasts longer shows by itself what it is."""
    LEAST_S = 1e-3
    """Seconds of streams that are always taken to have been: what is divided by is not nothing."""
    WEIGHT = 2.0
    """Charges for more than the usual: prompts come in clusters, and a stream cannot leave. Found
    in the simulator: with 1, requests that come one by one leave streams at prefill engines, whose
    tokens are two to three times as late; 3 changes nothing.
    """

    def __init__(self) -> None:
        self._stream_seconds = self.FIRST_LASTS_S
        self._met_s = self.FIRST_MET * self._stream_seconds
        """Seconds of prompts, each times the streams that they have met."""
        self._late_s = self.FIRST_LATE * self._stream_seconds
        """Seconds that tokens usually take of which prompts would have made others late."""
        self._told: dict[EngineKey, float] = {}
        self._last = (0.0, 0.0)
        """Seconds that the last prompt has met, and would have made late."""

    def arrives(self, num_tokens: int, loads: Sequence[Load]) -> None:
        """Count a prompt of which so many tokens have to be computed, and the time that streams
        have lasted since the one before, which engines tell.
        """
        told = {
            load.engine.key: 0.0
            if load.engine.report is None
            else load.engine.report.stream_seconds
            for load in loads
        }
        since = sum(max(0.0, now - self._told.get(key, now)) for key, now in told.items())
        self._told = told
        num_streams = sum(load.num_streams for load in loads)
        prompt_s = min(load.lengthens_s(num_tokens) for load in loads)
        step_s = max(load.decode_s for load in loads)
        # What comes while others wait is computed in the same pause as they.
        num_busy = sum(load.queued_tokens > 0 for load in loads)
        begins = max(0.0, 1 - 2 * num_busy / len(loads))
        keeps = 1 - self.FORGETS
        self._last = num_streams * prompt_s, begins * num_streams * step_s
        self._met_s = self._met_s * keeps + self._last[0]
        self._late_s = self._late_s * keeps + self._last[1]
        self._stream_seconds = max(self.LEAST_S, self._stream_seconds * keeps + since)

    def take_back(self) -> None:
        """Take the last prompt back: nobody computes it."""
        met_s, late_s = self._last
        self._met_s -= met_s
        self._late_s -= late_s
        self._last = (0.0, 0.0)

    def of_prefill(self, loads: Sequence[Load]) -> float:
        """Return how many seconds of prompts a stream at one of the prefill engines meets in each
        second of its own; 0: so few at once that it may be there.
        """
        num_prefill = sum(load.engine.role == "prefill" for load in loads)
        if not num_prefill or self._late_s / self._stream_seconds / num_prefill < self.MOST_LATE:
            return 0.0
        return self.WEIGHT * self._met_s / self._stream_seconds / num_prefill
