"""Requests that a rank may have died of: they are given to the next engine with a mark, and once
more at most.

A rank that dies by itself makes the requests of its last step suspects. An engine never has two
suspects in a step, so that one whose step ends with a death again is the cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pdlaunch.errors import KillsEngineError
from pdlaunch.http.headers import ORIGIN_HEADER, format_origin
from pdlaunch.protocol.control import Suspects
from pdlaunch.protocol.ids import PromptOrigin


class SuspectBook:
    """Remembers what is known against the requests that run, and nothing of others."""

    def __init__(self) -> None:
        self._num_deaths: dict[PromptOrigin, int] = {}
        """By origin: 1 for a suspect, 2 for one that was a suspect already."""

    @contextmanager
    def watch(self, origin: PromptOrigin) -> Iterator[None]:
        """A request runs for as long as the block does."""
        self._num_deaths[origin] = 0
        try:
            yield
        finally:
            del self._num_deaths[origin]

    def take(self, news: Suspects) -> None:
        """A rank has died."""
        for origin in news.origins:
            if origin in self._num_deaths:
                self._num_deaths[origin] = (
                    2 if origin in news.repeated else max(1, self._num_deaths[origin])
                )

    def header(self, origin: PromptOrigin) -> dict[str, str]:
        """Return the header that tells an engine of it; empty when there is nothing against it."""
        return (
            {ORIGIN_HEADER: format_origin(origin, is_suspect=True)}
            if self._num_deaths[origin]
            else {}
        )

    def check(self, origin: PromptOrigin) -> None:
        """Raises KillsEngineError when a second rank has died of the request."""
        if self._num_deaths[origin] > 1:
            raise KillsEngineError(
                "this request made an engine crash twice, the second time alone; it is not tried "
                "again"
            )
