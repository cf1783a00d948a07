"""Memory goes back to the system after large requests: malloc keeps what it got, and a process
would stay as large as it was.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc

LARGE_BYTES = 64 * 1024
"""Of a body; tokenizing its text takes a hundred times as much."""
COLLECT_BYTES = 1024**2
"""From here on it is worth 50 ms to have the garbage collector look for bodies: errors that were
raised hold them in cycles.
"""
DELAY_S = 1.0
"""From the end of a large request on: its last objects are gone by then, and others' ends with
it.
"""


class MemoryReturn:
    """Asks malloc to return what is free, at most once in ``DELAY_S``; belongs to the event
    loop.
    """

    def __init__(self) -> None:
        self._due: asyncio.TimerHandle | None = None
        self._longest_bytes = 0

    def after(self, num_bytes: int) -> None:
        """A request that has held ``num_bytes`` is over."""
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
