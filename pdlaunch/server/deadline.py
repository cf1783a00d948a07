"""The longest life of a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pdlaunch.errors import OverloadedError


class Deadline:
    """Begins with its construction, inside a running event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._at_s = asyncio.get_running_loop().time() + timeout_s

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Raises OverloadedError (503) when the body is not done in time."""
        try:
            async with asyncio.timeout_at(self._at_s):
                yield
        except TimeoutError:
            raise OverloadedError(
                f"the request was not finished within {self._timeout_s:g} s",
                status=503,
                code="request_timeout",
            ) from None
