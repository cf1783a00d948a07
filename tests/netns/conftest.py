"""Several hosts on this machine: ``make test-hosts``. They are skipped, by name, where this machine
permits no namespaces or no network devices of one's own.
"""

from collections.abc import Iterator

import pytest

from tests.netns.hosts import Network, new_network, why_not


@pytest.fixture(scope="session", autouse=True)
def permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts, ``a`` and ``b``, and a stranger on their network."""
    with new_network("a", "b", "stranger") as network:
        yield network
