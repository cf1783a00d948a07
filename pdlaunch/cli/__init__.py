"""The command line; the only room that renders."""

import sys

from pdlaunch.cli.end_signals import EndSignals

EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the ``pdlaunch`` script; imports inside, so that Ctrl-C ends them as quietly
    as a command.
    """
    signals = EndSignals()
    signals.install()
    try:
        from pdlaunch.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(signals.exit_code)
    except SystemExit as end:
        sys.exit(signals.exit_code if end.code == EXIT_INTERRUPTED else end.code)
