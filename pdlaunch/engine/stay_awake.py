"""Begin the first step after a pull without delay. Serving is right without it, only slower."""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq

from pdlaunch.machine.kernel import sleep_precisely
from pdlaunch.transfer.thread import TransferThread

SLEEP_S = 20e-6
REHEARSAL_BYTES = 256 * 1024**2
"""A READ of 0.7 ms over NVLink; shorter ones are over before a rehearsal is."""


class StayAwake:
    """Keeps rank 0 of a GPU engine busy while the last blocks of a pull are on their way.

    A thread that sleeps in ``poll`` begins the step 0.3 ms late (0.1 to 0.7 ms on virtual
    machines), and code that has not run for 100 ms takes two to three times as long: so this polls
    every 20 us, and rehearses what a step does first on the host.
    """

    def __init__(self, transfer: TransferThread, rehearse: Callable[[], None]) -> None:
        self._transfer = transfer
        self._rehearse = rehearse
        sleep_precisely()

    def wait(self, poller: zmq.Poller) -> None:
        """Return when ``poller`` has something, or at once when no pull is about to end.

        No step is in flight.
        """
        if time.monotonic() >= self._transfer.awake_until_at:
            return
        if self._transfer.awaited_bytes >= REHEARSAL_BYTES:
            self._rehearse()
        while time.monotonic() < self._transfer.awake_until_at and not poller.poll(0):
            time.sleep(SLEEP_S)
