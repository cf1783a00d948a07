"""Waits for a condition, with a time limit that only a fault exceeds."""

from __future__ import annotations

import time
from collections.abc import Callable


def await_true(
    condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = 180.0
) -> None:
    """``what`` names the condition for the error; as a function it may add the present state."""
    deadline_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_at, (
            f"not in {timeout_s:g} s: {what if isinstance(what, str) else what()}"
        )
        time.sleep(0.05)
