"""Who may come in: a bound on requests in flight, and none while draining."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from pdlaunch.errors import OverloadedError, RequestError

DRAIN_RETRY_AFTER_S = 5


class Ticket:
    """A request's share of the bound: one, then one for each of its choices."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def grow(self, size: int, param: str) -> None:
        """Raises OverloadedError (429), or RequestError when the request alone is too large."""
        limit = self._admission.limit
        if size > limit:
            raise RequestError(
                f"{size} choices in one request; at most {limit} are accepted", param=param
            )
        if self._admission.in_flight + size - self.size > limit:
            raise OverloadedError(f"more than {limit} requests in flight", code="too_many_requests")
        self._admission.in_flight += size - self.size
        self.size = size


class Admission:
    """Counts choices in flight; belongs to the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.draining = False
        self.asleep = False
        """The engine sleeps, or is about to."""
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, *, even_asleep: bool = False) -> Iterator[Ticket]:
        """Hold a place for a request; raises OverloadedError (503 while closed, 429 when full)."""
        self.check_open(even_asleep=even_asleep)
        ticket = Ticket(self)
        ticket.grow(1, "n")
        self._idle.clear()
        try:
            yield ticket
        finally:
            self.in_flight -= ticket.size
            if self.in_flight == 0:
                self._idle.set()

    def check_open(self, *, even_asleep: bool = False) -> None:
        """Raises OverloadedError (503) while the engine drains or sleeps; ``even_asleep``: what
        needs no rank.
        """
        if self.draining:
            raise OverloadedError(
                "the engine is shutting down",
                status=503,
                retry_after_s=DRAIN_RETRY_AFTER_S,
                code="shutting_down",
            )
        if self.asleep and not even_asleep:
            raise OverloadedError(
                "the engine sleeps",
                status=503,
                retry_after_s=DRAIN_RETRY_AFTER_S,
                code="engine_sleeping",
            )

    async def drain(self, timeout_s: float) -> None:
        """Refuse what comes, wait for what runs, at most ``timeout_s``."""
        self.draining = True
        await self.wait_idle(timeout_s)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait for what runs, at most ``timeout_s``; whether nothing runs any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()
