"""Implements the command line. Only this package prints for users."""

import signal
import sys
from types import FrameType

EXIT_FAILED = 1  # a deployment failed, or a check has findings
EXIT_UNUSABLE = 2  # the command's input cannot be used
EXIT_INTERRUPTED = 130
_EXIT_BY_SIGNAL = 128


def main() -> None:
    """Run the ``pdlaunch`` script. Imports are inside, so that Ctrl-C is quiet during them too."""
    first = catch_end_signals()
    try:
        from pdlaunch.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(_EXIT_BY_SIGNAL + first[0])
    except SystemExit as end:
        sys.exit(_EXIT_BY_SIGNAL + first[0] if end.code == EXIT_INTERRUPTED else end.code)


def catch_end_signals() -> list[int]:
    """Make SIGTERM and SIGHUP end a command like Ctrl-C, so that it stops its own processes.
    Returns a list of one item, which handlers replace: SIGINT, or the other signal that came first.
    A SIGHUP that ``nohup`` ignores stays ignored.
    """
    first: list[int] = [signal.SIGINT]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if first[0] == signal.SIGINT:
            first[0] = number
        # asyncio installs its own handler of SIGINT while it runs.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)

    # A shell ignores SIGINT in commands that a script starts in the background.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    return first
