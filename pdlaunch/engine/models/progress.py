"""The type of functions to which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

ReportProgress = Callable[[str, float | None], None]
"""Called with what is done now and the fraction that is complete; None where that is unknown."""
