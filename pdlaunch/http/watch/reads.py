"""Reads in an engine's counts whether it gets the KV blocks that it is to read."""

from __future__ import annotations

from pdlaunch.http.watch.canary import BYTES_READ
from pdlaunch.http.watch.engine_api import Counts

_FAILED = "vllm:nixl_num_failed_transfers_total"


class FailedReads:
    """Finds out, look by look at an engine of vLLM, that its READs fail and none comes through."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        """Failed READs and bytes read, at the last look."""

    def look(self, counts: Counts) -> bool:
        """Return whether READs have failed since the last look, and no byte has come."""
        failed, num_bytes = counts.total(_FAILED), counts.total(BYTES_READ["vllm"])
        before, self._before = self._before, (failed, num_bytes)
        return before is not None and failed > before[0] and num_bytes <= before[1]
