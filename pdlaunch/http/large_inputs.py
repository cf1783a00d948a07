"""Large inputs are worked at in threads, so that the event loop turns meanwhile: others are served,
and heartbeats go out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BODY_BYTES = 64 * 1024
LARGE_TEXT_BYTES = 4 * 1024
"""From here on parsing, or tokenizing, takes about a millisecond, and a thread is worth its 0.1
ms.
"""
NUM_THREADS = 2
"""What one piece of work needs, in memory above all, is needed so many times at most."""

T = TypeVar("T")


class LargeInputs:
    """The threads of one process; further work waits for one of them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="large-input")

    async def run(self, is_large: bool, work: Callable[[], T]) -> T:
        """Do ``work``, in a thread when its input is large."""
        if not is_large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
