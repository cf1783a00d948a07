from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

# No test asks a hub but one of its own.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["tests.memory_guard", "tests.process_guard"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

E2E = "tests/e2e/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the launches first: the other tests fill the second core meanwhile."""
    items.sort(key=lambda item: not item.nodeid.startswith(E2E))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep the tests of a file in one worker, and all that start launches, which need both cores
    each.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return E2E if nodeid.startswith(E2E) else nodeid.partition("::")[0]

    return ByFile(config, log)
