"""The command line; the only room that renders."""

from pdlaunch.cli.app import main

__all__ = ["main"]
