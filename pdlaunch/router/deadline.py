"""How long a request may live: up to the limit that all have, or until the router leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pdlaunch.errors import OverloadedError
from pdlaunch.router.admission import shutting_down
from pdlaunch.router.generation import RETRY_AFTER_S


class Deadline:
    """Ends what runs under ``guard`` with an error that its client can act on; belongs to the event
    loop.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: set[asyncio.Timeout] = set()
        self._closed = False

    def close(self) -> None:
        """Now is the end of what runs and of all that comes; once is as good as twice."""
        self._closed = True
        for timeout in self._running:
            if not timeout.expired():
                timeout.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """The life of one request. Raises OverloadedError (503) at its end."""
        if self._closed:
            raise shutting_down()
        timeout = asyncio.timeout(self._limit_s)
        try:
            async with timeout:
                self._running.add(timeout)
                try:
                    yield
                finally:
                    self._running.discard(timeout)
        except TimeoutError:
            raise shutting_down() if self._closed else self._too_late() from None

    def _too_late(self) -> OverloadedError:
        message = f"the request was not answered within {self._limit_s:g} s"
        return OverloadedError(
            message, status=503, retry_after_s=RETRY_AFTER_S, code="request_timeout"
        )
