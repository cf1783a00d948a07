"""Signals as events: handlers only append; the loop acts."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class SignalInbox:
    """Collects stop signals between ``__enter__`` and ``__exit__``; ``fileno`` becomes readable
    with each.

    Only the main thread can have handlers: elsewhere it stays empty.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> SignalInbox:
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False
            )
            self._before = {number: signal.signal(number, self._on_signal) for number in _wanted()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> list[int]:
        """The signals since the last call, oldest first."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        received, self._received = self._received, []
        return received

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)


def _wanted() -> list[int]:
    """The stop signals by number, without a hangup that is ignored: ``nohup`` means it."""
    numbers = [int(getattr(signal, name)) for name in STOP_SIGNALS]
    return [
        number
        for number in numbers
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]
