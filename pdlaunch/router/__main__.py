"""Runs the router of a launch: ``python -m pdlaunch.router --name router``."""

import sys

from pdlaunch.http.lifecycle import run_supervised
from pdlaunch.router.main import run_in_launch

if __name__ == "__main__":
    sys.exit(run_supervised(run_in_launch))
