"""Waits for a condition, with a time limit that only a fault exceeds."""

import time
from collections.abc import Callable

from pdlaunch.errors import PdlaunchError


def await_true(
    condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = 180.0
) -> None:
    """``what`` names the condition for the error; as a function it may add the present state. A
    server that does not answer yet does not end the wait.
    """
    deadline_at = time.monotonic() + timeout_s
    while True:
        failure = None
        try:
            if condition():
                return
        except (OSError, PdlaunchError) as error:
            failure = error
        if time.monotonic() > deadline_at:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not in {timeout_s:g} s: {told}") from failure
        time.sleep(0.05)
