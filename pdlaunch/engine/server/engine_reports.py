"""Passes on to routers what rank 0 reports with each step."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from pdlaunch.protocol.costs import EngineReport


class EngineReports:
    """Holds the latest report.

    Of all the streams of a step the first one tells of it, so that it costs a step and not a token.
    """

    def __init__(self) -> None:
        self._latest: EngineReport | None = None
        self._is_told = True

    def take(self, report: EngineReport | None) -> None:
        """Note what rank 0 has said; None: it has said nothing."""
        if report is not None:
            self._latest, self._is_told = report, False

    def latest(self) -> EngineReport | UnsetType:
        """Return the latest report, for the end of an answer."""
        self._is_told = True
        return UNSET if self._latest is None else self._latest

    def unheard(self) -> EngineReport | UnsetType:
        """Return the latest report unless it has been told already."""
        return UNSET if self._is_told else self.latest()
