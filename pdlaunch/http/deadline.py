"""Limits the life of requests: all have the same time, less when the process leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from pdlaunch.errors import OverloadedError


class Deadlines:
    """Starts the deadlines of a process and can end all of them; belongs to the event loop.

    ``shutting_down`` makes the error for those whose deadline ends early; ``retry_after_s`` is what
    the others are told.
    """

    def __init__(
        self,
        limit_s: float,
        shutting_down: Callable[[], OverloadedError],
        *,
        retry_after_s: int = 1,
    ) -> None:
        self._limit_s = limit_s
        self._retry_after_s = retry_after_s
        self._shutting_down = shutting_down
        self._running: set[asyncio.Timeout] = set()
        self._is_closed = False

    def close(self) -> None:
        """End what runs and all that comes. Safe to call twice."""
        self._is_closed = True
        for timeout in self._running:
            # One that has just expired cannot be moved any more; it ends anyway.
            if not timeout.expired():
                timeout.reschedule(0.0)

    def start(self, wanted_s: float | None = None) -> Deadline:
        """Start the deadline of one request now. ``wanted_s``: the time that its client gives."""
        now_at = asyncio.get_running_loop().time()
        if wanted_s is None:
            return Deadline(self, now_at + self._limit_s, self._limit_s)
        limit_s = min(wanted_s, self._limit_s)
        return Deadline(self, now_at + limit_s, limit_s, wanted_at=now_at + wanted_s)

    @contextlib.asynccontextmanager
    async def guard_until(self, end_at: float, limit_s: float) -> AsyncIterator[None]:
        """Run the block until ``end_at`` on the loop's clock, ``limit_s`` after its start.

        Raises OverloadedError (503).
        """
        if self._is_closed:
            raise self._shutting_down()
        timeout = asyncio.timeout_at(end_at)
        try:
            async with timeout:
                self._running.add(timeout)
                try:
                    yield
                finally:
                    self._running.discard(timeout)
        except TimeoutError:
            raise self._shutting_down() if self._is_closed else self._too_late(limit_s) from None

    def _too_late(self, limit_s: float) -> OverloadedError:
        return OverloadedError(
            f"the request was not answered within {limit_s:g} s",
            status=503,
            retry_after_s=self._retry_after_s,
            code="request_timeout",
        )


class Deadline:
    """Limits the life of one request, whose parts run under ``guard`` one after another."""

    def __init__(
        self,
        deadlines: Deadlines,
        end_at: float,
        limit_s: float,
        *,
        wanted_at: float | None = None,
    ) -> None:
        self._deadlines = deadlines
        self._end_at = end_at
        self._limit_s = limit_s
        self.wanted_at = wanted_at
        """Instant on the event loop's clock by which the client wants the whole answer; None: it
        does not say.
        """

    def guard(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Run the block until the deadline. Raises OverloadedError (503) when it ends there."""
        return self._deadlines.guard_until(self._end_at, self._limit_s)
