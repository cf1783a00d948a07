"""The command line is the only room that renders."""

from __future__ import annotations

import signal
import sys
from types import FrameType

EXIT_FAILED = 1  # a deployment failed, or a check has findings
EXIT_UNUSABLE = 2  # the command's input cannot be used
EXIT_INTERRUPTED = 130
_EXIT_BY_SIGNAL = 128


def main() -> None:
    """Run the ``pdlaunch`` script. It imports inside, so that Ctrl-C ends imports quietly too."""
    first = catch_end_signals()
    try:
        from pdlaunch.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(_EXIT_BY_SIGNAL + first[0])
    except SystemExit as end:
        sys.exit(_EXIT_BY_SIGNAL + first[0] if end.code == EXIT_INTERRUPTED else end.code)


def catch_end_signals() -> list[int]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it stops what it has started.

    Returns a list whose one item is the signal that came first, SIGINT by default. A hangup that
    ``nohup`` lets be ignored stays ignored.
    """
    first: list[int] = [signal.SIGINT]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if first[0] == signal.SIGINT:
            first[0] = number
        # asyncio has a handler of its own while it runs.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)

    # Shells make it ignored for what a script starts in the background.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    return first
