"""The hosts of these tests are as far from each other as machines are, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pdlaunch.machine.host import host_identity
from tests.e2e.faults import lives
from tests.netns.hosts import ROOT, TIMEOUT_S, Network


def test_hosts_share_nothing_but_the_network(network: Network):
    a, b = network["a"], network["b"]
    assert a.run("hostname") == "a\n"
    assert b.run("hostname") == "b\n"
    for path in ("/tmp/file", "/dev/shm/file"):
        a.file(path).write_text("mine")
        assert not b.file(path).exists()
        assert not Path(path).exists()
    identity = "from pdlaunch.machine.host import host_identity; print(host_identity())"
    identities = {host.run(sys.executable, "-c", identity) for host in (a, b)}
    assert len(identities | {host_identity()}) == 3
    assert set(os.listdir("/sys/class/net")) != set(a.run("ls", "/sys/class/net").split())  # noqa: PTH208
    # Kernels before 5.6 have no clocks of a host's own.
    if Path("/proc/self/ns/time").exists():
        code = "import time; print(time.monotonic())"
        shown = [float(host.run(sys.executable, "-c", code)) for host in (a, b)]
        assert shown[1] - shown[0] > 80_000


def test_killed_test_leaves_nothing():
    """SIGKILL of the process that made the hosts."""
    code = (
        "import time\nfrom subprocess import Popen\nfrom tests.netns.hosts import new_network\n"
        "with new_network('a', 'b') as network:\n"
        "    sleeper = Popen(network['a'].command('sleep', '1000'))\n"
        "    while not network['a'].processes():\n"
        "        time.sleep(0.01)\n"
        "    print(network['a'].pid, network['b'].pid, network.switch.pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as maker:
        try:
            assert maker.stdout is not None
            pids = [int(word) for word in maker.stdout.readline().split()]
            tree = psutil.Process(maker.pid).children(recursive=True)
        finally:
            maker.kill()
    assert {process.pid for process in tree} >= set(pids)
    end_at = time.monotonic() + TIMEOUT_S
    while (alive := [each for each in tree if lives(each)]) and time.monotonic() < end_at:
        time.sleep(0.01)
    assert alive == []
