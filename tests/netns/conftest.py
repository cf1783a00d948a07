"""Several hosts on this machine: ``make test-hosts``. They are skipped, by name, where this machine
permits no namespaces or no network devices of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.hosts import Network, new_network, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/netns/"):
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="session", autouse=True)
def permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts, ``a`` and ``b``, and a stranger on their network."""
    with new_network("a", "b", "stranger") as network:
        yield network
