"""Runs a launch of fake children in a process of its own.

It prints their pids when it is ready, and ends on SIGTERM, or with its input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchStatus
from tests.launch.fakes import FakeObserver
from tests.launch.real import real_plan, run_plan


class PrintingObserver(FakeObserver):
    def ready(self, status: LaunchStatus) -> None:
        sys.stdout.write(json.dumps([process.pid for process in status.processes]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(
        run_plan(
            real_plan(),
            PrintingObserver(),
            Path(sys.argv[1]),
            Timing(),
            lifeline=sys.stdin.fileno(),
        ).exit_code
    )
