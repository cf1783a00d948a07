"""The hosts of these tests are as far from each other as machines are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pdlaunch.machine.host import host_identity
from tests.netns.hosts import Network


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
