"""Reads an engine's stream, and looks after the engine when it is silent.

::

    read ─── wait ─── bytes      a timer for the whole stream, not one for each read: it fires every
         └─ stall_s ─▶ probe     ``stall_s`` at most, and looks at the read that waits

A timer for each token would cost the router a tenth of its time for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import aiohttp

from pdlaunch.http.engine_url import describe_client_error
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure

END_S = 1.0
"""Time for which an engine that has said all is waited for, to use its connection again."""


class EngineReader:
    """Reads the body of one answer, one task at a time. ``close`` it.

    ``probe`` is awaited after each silence of ``stall_s``, and raises when the engine has died.
    """

    def __init__(
        self,
        engine: Engine,
        response: aiohttp.ClientResponse,
        stall_s: float,
        probe: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._response = response
        self._stall_s = stall_s
        self._probe = probe
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        """The task that has read last."""
        self._waits_since_at: float | None = None
        """Instant since which it waits for bytes."""
        self._has_stalled = False
        self._timer = self._loop.call_later(stall_s, self._look)

    async def read_some(self) -> bytes:
        """Return the next bytes, none at the end.

        Raises EngineFailure when the engine has died or hangs.
        """
        while True:
            self._task, self._waits_since_at = asyncio.current_task(), time.monotonic()
            try:
                return await self._response.content.readany()
            except asyncio.CancelledError:
                if not self._has_stalled:
                    raise
                self._has_stalled, self._waits_since_at = False, None
                # Somebody else may have cancelled the task, too.
                if self._task is not None and self._task.uncancel() > 0:
                    raise
                await self._probe()
            except aiohttp.ClientError as error:
                reason = f"stream broke: {describe_client_error(error)}"
                raise EngineFailure(self._engine, reason) from error
            finally:
                self._waits_since_at = None

    def close(self) -> None:
        """Give up the answer: one that has not ended must not go back into the pool of
        connections.
        """
        self._timer.cancel()
        self._response.close()

    async def end(self) -> None:
        """Read to the end of an answer of which nothing more is wanted, and close it.

        Its connection can be used again when the end comes soon.
        """
        self._timer.cancel()
        try:
            async with asyncio.timeout(END_S):
                while await self._response.content.readany():
                    pass
        except (aiohttp.ClientError, TimeoutError):
            return
        finally:
            self._response.close()

    @property
    def has_ended(self) -> bool:
        """Tell whether all of the answer has come."""
        return self._response.content.at_eof()

    def _look(self) -> None:
        """Wake the task that has waited for too long; look again when another one may have."""
        next_s = self._stall_s
        if self._waits_since_at is not None and self._task is not None:
            left_s = self._waits_since_at + self._stall_s - time.monotonic()
            if left_s <= 0:
                self._has_stalled = True
                self._task.cancel()
            else:
                next_s = left_s
        self._timer = self._loop.call_later(next_s, self._look)
