"""Tells a router which engines it may use, as a stream of registries.

The supervisor of a launch is one source; ``membership_watch`` makes registries of engines that
somebody else started. The router follows each Membership in the same way.
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


class AnnouncedMembership:
    """Passes on the registries that it is told of; belongs to the event loop."""

    def __init__(self) -> None:
        self._latest: Registry | None = None
        self._has_news = asyncio.Event()

    def announce(self, registry: Registry) -> None:
        """Take over the latest registry."""
        self._latest = registry
        self._has_news.set()

    async def versions(self) -> AsyncIterator[Registry]:
        while True:
            await self._has_news.wait()
            # Cleared before the yield: what comes while the reader works is news again.
            self._has_news.clear()
            assert self._latest is not None
            yield self._latest
