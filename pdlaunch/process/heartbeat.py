"""How a process shows that its main loop turns: a thread of its own would go on while the loop
hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pdlaunch.protocol.control import Alive


class Heartbeat:
    """Says Alive every ``interval_s``, never when that is 0."""

    def __init__(
        self,
        send: Callable[[Alive], None],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._interval_s = interval_s
        self._clock = clock
        self._due_s = clock()

    def beat(self) -> None:
        """Call it with every turn of a loop."""
        now_s = self._clock()
        if self._interval_s and now_s >= self._due_s:
            self._due_s = now_s + self._interval_s
            self._send(Alive())

    async def run(self) -> None:
        """Beat with the event loop, until cancelled."""
        while self._interval_s:
            self.beat()
            await asyncio.sleep(self._interval_s)
