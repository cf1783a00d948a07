"""What is left of an engine's processes when its sidecar is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import psutil
import pytest

from tests.e2e.waiting import await_true

pytestmark = pytest.mark.processes
SIDECAR = """
import subprocess, sys, time
from pdlaunch.launch.sidecar.child import guard_group
guard = guard_group()
server = subprocess.Popen(
    ("sh", "-c", "sleep 600 & echo $!; wait"), stdout=subprocess.PIPE, text=True
)
print(guard.pid, server.pid, server.stdout.readline().strip(), flush=True)
time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_children_of_the_server_go_with_a_sidecar_that_is_killed() -> None:
    with subprocess.Popen(
        (sys.executable, "-c", SIDECAR), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as sidecar:
        assert sidecar.stdout is not None
        pids = [int(pid) for pid in sidecar.stdout.readline().split()]
        assert len(pids) == 3
        # The supervisor's signals reach the group, and the guard is of it.
        psutil.Process(pids[0]).send_signal(signal.SIGTERM)
        sidecar.kill()
        await_true(lambda: all(map(is_gone, pids)), "server, its child and the guard are gone", 60)
