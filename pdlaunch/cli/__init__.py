"""The command line is the only room that renders."""

from __future__ import annotations

import signal
import sys
from types import FrameType

EXIT_FAILED = 1
"""A deployment failed, or a check has findings."""
EXIT_UNUSABLE = 2
"""The command's input cannot be used."""
EXIT_INTERRUPTED = 130
_EXIT_BY_SIGNAL = 128


def main() -> None:
    """Run the ``pdlaunch`` script. It imports inside, so that Ctrl-C ends imports quietly too."""
    signals = EndSignals()
    signals.install()
    try:
        from pdlaunch.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(signals.exit_code)
    except SystemExit as end:
        sys.exit(signals.exit_code if end.code == EXIT_INTERRUPTED else end.code)


class EndSignals:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it stops what it has started.

    ``install`` it once in a process, in the main thread.
    """

    def __init__(self) -> None:
        self._first = signal.SIGINT

    def install(self) -> None:
        """Install the handlers; a hangup that ``nohup`` lets be ignored stays ignored."""
        # Shells make it ignored for what a script starts in the background.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @property
    def exit_code(self) -> int:
        """Return the exit code of an interrupted process, as a shell reports it."""
        return _EXIT_BY_SIGNAL + self._first

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._first is signal.SIGINT:
            self._first = signal.Signals(number)
        # asyncio has a handler of its own while it runs.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)
