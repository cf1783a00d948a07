"""Finds out, look by look at an engine's counts, that it stands still.

::

    has work, counts progress ──> works        has work, no progress for timeout_s ──> hangs
    has no work for timeout_s ──> idle: whoever watches gives it some, and the next looks tell

An engine whose core has stopped says that it is healthy, and that it has nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from pdlaunch.http.watch.engine_api import VLLM_RUNNING, Counts

_PROGRESS = ("vllm:generation_tokens_total", "vllm:iteration_tokens_total_sum")
Found = Literal["works", "idle", "hangs"]


class EngineHangWatch:
    """Judges one engine of vLLM. ``timeout_s``: 0 for an engine that never hangs nor idles."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen: tuple[float, bool] | None = None
        """Progress, and whether it has work."""
        self._since_at = 0.0
        """Instant since which it was seen so."""

    def look(self, counts: Counts, *, is_probed: bool) -> Found:
        """Judge it. ``is_probed``: it has work whatever it counts."""
        now_at = self._clock()
        has_work = is_probed or any(counts.total(name) for name in VLLM_RUNNING)
        seen = (sum(counts.total(name) for name in _PROGRESS), has_work)
        if seen != self._seen:
            self._seen, self._since_at = seen, now_at
        if not 0 < self._timeout_s < now_at - self._since_at:
            return "works"
        self._since_at = now_at
        return "hangs" if has_work else "idle"
