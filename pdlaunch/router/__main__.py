"""Runs as ``python -m pdlaunch.router --name router``: the router of a launch.

The supervisor starts it, with a Bootstrap on standard input that has the name too.
"""

from __future__ import annotations

import sys

from pdlaunch.http.lifecycle import run_supervised
from pdlaunch.router.main import run_in_launch

if __name__ == "__main__":
    sys.exit(run_supervised(run_in_launch))
