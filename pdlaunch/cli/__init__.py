"""The command line; the only room that renders."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the ``pdlaunch`` script; imports inside, so that Ctrl-C ends them as quietly as a command."""
    try:
        from pdlaunch.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
