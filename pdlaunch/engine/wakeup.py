"""Wakes a thread that polls ZMQ sockets, from any other thread."""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """A pipe: ``fd`` goes into the poller, ``set`` may be called from anywhere and never blocks."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)

    def set(self) -> None:
        # A full pipe wakes the poller as well as one more byte would.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass
