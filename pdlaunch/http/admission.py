"""Admits requests up to a limit of those in flight, and none while the process drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from pdlaunch.errors import OverloadedError, RequestError


class Ticket:
    """Holds the places that one request takes, one for each of its choices."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def grow(self, size: int, param: str) -> None:
        """Take ``size`` places in all; ``param`` names the field that asks for so many.

        Raises OverloadedError (429), or RequestError when the request alone exceeds the limit.
        """
        limit, in_flight = self._admission.limit, self._admission.in_flight
        if size > limit:
            raise RequestError(
                f"{param}: {size} choices in one request, but at most {limit} are served at a time",
                param=param,
            )
        if in_flight + size - self.size > limit:
            raise OverloadedError(
                f"{in_flight} requests are in flight; at most {limit} are served at a time",
                code="too_many_requests",
            )
        self._admission.in_flight += size - self.size
        self.size = size


class Admission:
    """Counts answers in flight; belongs to the event loop.

    ``shutting_down`` makes the error for those who come while the process drains.
    """

    def __init__(self, limit: int, shutting_down: Callable[[], OverloadedError]) -> None:
        self.limit = limit
        self.in_flight = 0
        self.is_draining = False
        self._shutting_down = shutting_down
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, size: int = 1, param: str = "prompt") -> Iterator[Ticket]:
        """Hold ``size`` places while the block runs.

        Raises OverloadedError (503 while draining, 429 when full) and what ``Ticket.grow`` raises.
        """
        self.check_open()
        ticket = Ticket(self)
        ticket.grow(size, param)  # raises before the door counts anything
        self._idle.clear()
        try:
            yield ticket
        finally:
            self.in_flight -= ticket.size
            if self.in_flight == 0:
                self._idle.set()

    def check_open(self) -> None:
        """Raise OverloadedError (503) while the process drains."""
        if self.is_draining:
            raise self._shutting_down()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what comes and wait for what runs; False when ``timeout_s`` was too short."""
        self.is_draining = True
        return await self.wait_idle(timeout_s)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when ``timeout_s`` was too short."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()
