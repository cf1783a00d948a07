"""Keeps large requests from holding up a process, and from leaving it large.

Their inputs are worked at in threads, so that the event loop turns meanwhile: others are served,
and heartbeats go out. Afterwards their memory goes back to the system: malloc would keep it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BYTES = 64 * 1024
"""A body from this size on counts as large: tokenizing takes a hundred times as much."""
COLLECT_BYTES = 1024**2
"""Bytes from which on it is worth 50 ms to have the garbage collector look for bodies: errors that
were raised hold them in cycles.
"""
DELAY_S = 1.0
"""Seconds after the end of a large request: its last objects are gone by then, and others' ends
with it.
"""


class MemoryReturn:
    """Asks malloc to return what is free, at most once in ``DELAY_S``; belongs to the event
    loop.
    """

    def __init__(self) -> None:
        self._due: asyncio.TimerHandle | None = None
        self._longest_bytes = 0

    def after(self, num_bytes: int) -> None:
        """Note that a request which has held ``num_bytes`` is over."""
        self._longest_bytes = max(self._longest_bytes, num_bytes)
        if num_bytes >= LARGE_BYTES and self._due is None:
            self._due = asyncio.get_running_loop().call_later(DELAY_S, self._run)

    def _run(self) -> None:
        self._due = None
        collect, self._longest_bytes = self._longest_bytes >= COLLECT_BYTES, 0
        # In a thread: malloc takes milliseconds for each 100 MiB.
        asyncio.get_running_loop().run_in_executor(None, trim, collect)


def trim(collect: bool = False) -> None:
    """Return free memory of malloc to the system, after garbage has been collected; only glibc
    can.
    """
    if collect:
        gc.collect()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


LARGE_BODY_BYTES = 64 * 1024
LARGE_TEXT_BYTES = 4 * 1024
"""Bytes from which on parsing, or tokenizing, takes about a millisecond, and a thread is worth its
0.1 ms.
"""
NUM_INPUT_THREADS = 2
"""Bounds the memory of large work, which each thread needs once."""

T = TypeVar("T")


class LargeInputs:
    """Runs large work in a few threads; further work waits for one of them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_INPUT_THREADS, thread_name_prefix="large-input")

    async def run(self, is_large: bool, work: Callable[[], T]) -> T:
        """Do ``work``, in a thread when its input is large."""
        if not is_large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
