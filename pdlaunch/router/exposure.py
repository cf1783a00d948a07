"""Tells what a stream at a prefill engine has to reckon with: the prompts that are yet to come."""

from __future__ import annotations

from collections.abc import Sequence

from pdlaunch.router.cost_model import Load
from pdlaunch.router.engine import EngineKey


class Exposure:
    """Counts how many seconds of prompts a stream meets in each second of its own.

    Where requests come in bursts and end together, it meets hardly any, and may be anywhere; where
    they come one by one, those at a prefill engine delay its prompts and are delayed by them.
    """

    FORGETS = 1 / 128
    """Share of what was counted that each request lets go."""
    FIRST = 0.25
    """It holds until streams have lasted some time: a pair is what was asked for."""
    FIRST_LASTS_S = 2.0
    WEIGHT = 1.5
    """Found in the simulator: with 1, requests that come one by one leave streams at prefill
    engines.
    """

    def __init__(self) -> None:
        self._met = self.FIRST * self.FIRST_LASTS_S
        self._stream_seconds = self.FIRST_LASTS_S
        self._told: dict[EngineKey, float] = {}

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
        prompt_s = min(load.costs.steps.tokens_s(num_tokens) for load in loads)
        keeps = 1 - self.FORGETS
        self._met = self._met * keeps + num_streams * prompt_s
        self._stream_seconds = self._stream_seconds * keeps + since

    def of_prefill(self, loads: Sequence[Load]) -> float:
        """Return the share for a stream at one of the prefill engines."""
        num_prefill = sum(load.engine.role == "prefill" for load in loads)
        if not num_prefill:
            return 0.0
        return self.WEIGHT * self._met / self._stream_seconds / num_prefill
