"""Runs one call for all who ask for the same while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class SharedCalls(Generic[Key, Result]):
    """Calls ``make`` with a key once, however many tasks wait for what it returns or raises.

    Nothing is kept: who asks once it is done begins a new call. A task that is cancelled leaves the
    call to the others.
    """

    def __init__(self, make: Callable[[Key], Awaitable[Result]]) -> None:
        self._make = make
        self._running: dict[Key, asyncio.Future[Result]] = {}

    async def __call__(self, key: Key) -> Result:
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = asyncio.ensure_future(self._make(key))
            running.add_done_callback(lambda done: self._end(key, done))
        return await asyncio.shield(running)

    def _end(self, key: Key, done: asyncio.Future[Result]) -> None:
        del self._running[key]
        if not done.cancelled():
            done.exception()  # or it would be logged where nobody waits any more
