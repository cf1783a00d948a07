"""Runs a module that knows nothing of the supervisor, and dies with it: ``python -m
pdlaunch.protocol.process.guarded MODULE ...``.
"""

from __future__ import annotations

import runpy
import sys

from pdlaunch.protocol.process.bootstrap import die_with_parent


def main() -> None:
    """Run the module; standard input must be a pipe that the supervisor holds open."""
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
