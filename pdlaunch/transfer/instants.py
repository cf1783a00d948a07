"""Compares instants of the injected clock; None stands for one that never comes, or never was."""

from __future__ import annotations

from collections.abc import Iterable


def earliest(instants: Iterable[float | None]) -> float | None:
    """Return the first of the instants; None when there is none."""
    return min((at for at in instants if at is not None), default=None)


def latest(instants: Iterable[float | None]) -> float | None:
    """Return the last of the instants; None when there is none."""
    return max((at for at in instants if at is not None), default=None)


def is_due(at: float | None, now: float) -> bool:
    """Return whether the instant has come."""
    return at is not None and at <= now
