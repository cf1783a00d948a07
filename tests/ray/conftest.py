"""A real Ray cluster of several nodes on this machine, all of them on the loopback device.

Ray takes the address of the default route. So the tests move into a network namespace that has
none.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

NUM_WORKERS = 3
_CLONE_NEWNET = 0x40000000


@pytest.fixture(scope="session")
def loopback_alone() -> None:
    """This thread, and all that it starts, has the loopback device alone from now on."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"no network namespace can be made: {reason}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.fixture(scope="module")
def cluster(loopback_alone: None) -> Iterator[Any]:
    """A head without cores, and nodes of one core each."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(NUM_WORKERS):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
