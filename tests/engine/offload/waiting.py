"""Waiting for transfers in tests: results are fetched each time the handler wakes us."""

from __future__ import annotations

import threading

from pdlaunch.engine.offload.copies import OffloadHandler, TransferResult

TIMEOUT_S = 60.0


class Waiter:
    """``wake`` goes into the handler."""

    def __init__(self) -> None:
        self._wakes = threading.Semaphore(0)

    def wake(self) -> None:
        self._wakes.release()

    def results(self, handler: OffloadHandler, count: int) -> list[TransferResult]:
        found: list[TransferResult] = []
        while len(found) < count:
            assert self._wakes.acquire(timeout=TIMEOUT_S), "no transfer has ended in time"
            found += handler.get_finished()
        return found
