"""Keeps what was recorded of requests whose answer nobody took, for routers that ask afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict

from pdlaunch.observe.spans import SpanLog, SpanReport
from pdlaunch.protocol.ids import HopId

MAX_KEPT = 256
WAIT_S = 2.0
"""Rank 0 tells its part at the end of a step. A router may ask before its own leaving is seen."""


class UnsentSpans:
    """Keeps the spans of the last ``MAX_KEPT`` of these requests; belongs to the event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[HopId, tuple[SpanLog, asyncio.Event]] = OrderedDict()
        self._news = asyncio.Event()

    def keep(self, hop_id: HopId, spans: SpanLog, ended: asyncio.Event) -> None:
        """Keep the spans of a request, which are whole once ``ended`` is set."""
        self._kept[hop_id] = spans, ended
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        self._news.set()
        self._news = asyncio.Event()

    async def take(self, hop_id: HopId) -> SpanReport | None:
        """Return a request's spans, once; None when there are none of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                while hop_id not in self._kept:
                    await self._news.wait()
                await self._kept[hop_id][1].wait()
        kept = self._kept.pop(hop_id, None)
        return None if kept is None else kept[0].report()
