from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pdlaunch.client.deployment import Deployment, running_deployment

DEMO_ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory", "256MiB", "--log-requests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.processes)
            # Real models on a machine that others may use as well.
            item.add_marker(pytest.mark.timeout(900))


def clean_environ() -> dict[str, str]:
    """The environment of a launch whose prompts go through pairs, as transfers are what most tests
    look at; an idle decode engine would compute a prompt itself.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PDLAUNCH_") or name == "PDLAUNCH_CACHE"
    } | {"PDLAUNCH_ROUTING": "pairs"}


@pytest.fixture(scope="package")
def demo() -> Iterator[Deployment]:
    """One prefill and one decode engine with the demo model, float32; they end with the tests of
    this folder.
    """
    with running_deployment(DEMO_ARGUMENTS, environ=clean_environ()) as deployment:
        yield deployment
