"""A real Ray cluster of several nodes on this machine, all of them on the loopback device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NUM_WORKERS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.processes)
            # Ray's own.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, and nodes of one core each."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
        },
    )
    try:
        for _ in range(NUM_WORKERS):
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
