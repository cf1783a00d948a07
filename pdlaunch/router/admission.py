"""Who may come in: the limit of requests in flight, and the closed door of a router that drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from pdlaunch.errors import OverloadedError, RequestError

BUSY_RETRY_AFTER_S = 1
DRAINING_RETRY_AFTER_S = 5


class Admission:
    """Counts engine requests in flight (one a prompt)."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self.in_flight = 0
        self.is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, num_prompts: int) -> Iterator[None]:
        """Hold ``num_prompts`` places while the block runs. Raises OverloadedError, or RequestError
        when it never can.
        """
        if self.is_draining:
            raise shutting_down()
        if num_prompts > self._max_in_flight:
            raise RequestError(
                (
                    f"prompt: {num_prompts} prompts, but at most {self._max_in_flight} requests "
                    "are served at a time"
                ),
                param="prompt",
            )
        if self.in_flight + num_prompts > self._max_in_flight:
            message = (
                f"{self.in_flight} requests are in flight; at most {self._max_in_flight} are "
                "served at a time"
            )
            raise OverloadedError(
                message, retry_after_s=BUSY_RETRY_AFTER_S, code="too_many_requests"
            )
        self.in_flight += num_prompts
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= num_prompts
            if self.in_flight == 0:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Close the door and wait until nothing is in flight; False when ``timeout_s`` was too
        short.
        """
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self.in_flight == 0


def shutting_down() -> OverloadedError:
    """What those hear whom this router will not serve any more."""
    return OverloadedError(
        "the deployment is shutting down",
        status=503,
        retry_after_s=DRAINING_RETRY_AFTER_S,
        code="draining",
    )
