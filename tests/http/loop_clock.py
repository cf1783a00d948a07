"""Moves the clock of a test's event loop: no test waits for a limit, or must be done before one."""

import asyncio


def pass_time(seconds: float) -> None:
    """Let so much time pass at once; timers of that time are due the next time the loop turns."""
    loop = asyncio.get_running_loop()
    time_before = loop.time
    loop.time = lambda: time_before() + seconds  # type: ignore[method-assign]
