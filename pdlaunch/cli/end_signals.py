"""SIGTERM and SIGHUP end a command as Ctrl-C does, so that it stops what it has started on its way
out.
"""

from __future__ import annotations

import signal
from types import FrameType

_EXIT_BY_SIGNAL = 128


class EndSignals:
    """The handlers of a whole process; ``install`` once, in the main thread."""

    def __init__(self) -> None:
        self._first = signal.SIGINT

    def install(self) -> None:
        """Not for a hangup that is ignored: ``nohup`` means it."""
        # Shells make it ignored for what a script starts in the background.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @property
    def exit_code(self) -> int:
        """Of a process that was interrupted, as a shell tells it."""
        return _EXIT_BY_SIGNAL + self._first

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._first is signal.SIGINT:
            self._first = signal.Signals(number)
        # asyncio has a handler of its own while it runs.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)
