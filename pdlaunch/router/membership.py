"""Tells a router which engines it may use, as a stream of registries.

Today the supervisor is the only source. A list of URLs, a watched file or an admin API would be
others: each is a Membership, and the router follows any of them in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from pdlaunch.protocol.control import Registry


class Membership(Protocol):
    """Tells a router of its engines."""

    def versions(self) -> AsyncIterator[Registry]:
        """Yield the registry as it is, then each later version; each replaces the one before.

        A reader that is slow may miss versions, never the latest.
        """


class SupervisedMembership:
    """Passes on the registries of the launch's supervisor; belongs to the event loop."""

    def __init__(self) -> None:
        self._latest: Registry | None = None
        self._has_news = asyncio.Event()

    def announce(self, registry: Registry) -> None:
        """Take over the supervisor's latest registry."""
        self._latest = registry
        self._has_news.set()

    async def versions(self) -> AsyncIterator[Registry]:
        while True:
            await self._has_news.wait()
            # Cleared before the yield: what comes while the reader works is news again.
            self._has_news.clear()
            assert self._latest is not None
            yield self._latest
