"""The hosts of these tests are as far from each other as machines are, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pdlaunch.machine.kernel import host_identity
from tests.netns.hosts import ROOT, TIMEOUT_S, Host, Network

SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 7000), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("ready", flush=True)
connection, _ = server.accept()
total = 0
while received := connection.recv(1 << 20):
    total += len(received)
print(total)
"""  # noqa: E501
SEND = """
import socket, sys
socket.create_connection((sys.argv[1], 7000), timeout=60).sendall(bytes(int(sys.argv[2])))
"""
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7000), timeout=1)
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""


def send(network: Network, num_bytes: int, address: str = "") -> None:
    """Send bytes from a to b."""
    address = address or network["b"].address
    with network["b"].running(
        sys.executable, "-c", SERVE, address, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        network["a"].run(sys.executable, "-c", SEND, address, str(num_bytes))
        assert server.stdout.read() == b"%d\n" % num_bytes


def test_hosts_share_nothing_but_the_network(network: Network):
    a, b = network["a"], network["b"]
    assert a.run("hostname") == "a\n"
    assert b.run("hostname") == "b\n"
    for path in ("/tmp/file", "/dev/shm/file"):
        a.file(path).write_text("mine")
        assert not b.file(path).exists()
        assert not Path(path).exists()
    identity = "from pdlaunch.machine.kernel import host_identity; print(host_identity())"
    identities = {host.run(sys.executable, "-c", identity) for host in (a, b)}
    assert len(identities | {host_identity()}) == 3
    assert set(os.listdir("/sys/class/net")) != set(a.run("ls", "/sys/class/net").split())  # noqa: PTH208


def test_clocks_of_hosts_differ(network: Network):
    if not Path("/proc/self/ns/time").exists():
        pytest.skip("this kernel has no clocks of a host's own")
    code = "import time; print(time.monotonic())"
    shown = [float(network[name].run(sys.executable, "-c", code)) for name in ("a", "b")]
    assert shown[1] - shown[0] > 80_000


def test_bytes_are_counted(network: Network):
    send(network, 10 << 20)
    send(network, 1 << 20, network["b"].address6)
    assert 11 << 20 < network.num_bytes("a", "b") < 12 << 20
    assert network["b"].received_bytes() > 11 << 20
    assert network.num_bytes("a", "stranger") < 1 << 20


def test_listening_sockets_are_found(network: Network):
    with network["b"].running(
        sys.executable, "-c", SERVE, network["b"].address, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert [(each.address, each.port) for each in network["b"].listening()] == [
            (network["b"].address, 7000)
        ]
        assert not network["a"].listening()
        network["a"].run(sys.executable, "-c", SEND, network["b"].address, "1")


def test_links_lose_delay_and_are_cut(network: Network):
    network.set_link("b", loss=0.1, delay_s=0.01)
    send(network, 1 << 20)
    network.set_link("b", is_cut=True)
    assert network["a"].run(sys.executable, "-c", CONNECT, network["b"].address) != "connected\n"
    network.set_link("b")
    send(network, 1 << 20)


def test_host_that_falls_over_takes_all_of_its_processes(network: Network):
    with network["b"].running("sleep", "1000"):
        processes = eventually(network["b"])
        network["b"].kill()
        assert psutil.wait_procs(processes, TIMEOUT_S)[1] == []


def eventually(host: Host) -> list[psutil.Process]:
    """The processes of a host, once there are any."""
    end_at = time.monotonic() + TIMEOUT_S
    while not (found := host.processes()) and time.monotonic() < end_at:
        time.sleep(0.01)
    assert found
    return found


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


def lives(process: psutil.Process) -> bool:
    """Whoever is left to init may stay a zombie for a while."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
