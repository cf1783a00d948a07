import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No test asks a hub but one of its own.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before torch is imported. Each worker has a core: threads of two of them that wait for each other
# on the same cores take twice the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.garbage", "tests.process_guard"]

# How long examples take says more about the machine than about the code. Each run tries the same
# ones, so that a change is judged by what it changes; `--hypothesis-profile search` tries others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands that a test runs in this process set its logging up, for a process of their own."""
    root, ours = logging.getLogger(), logging.getLogger("pdlaunch")
    levels = root.level, ours.level
    yield
    for handler in root.handlers[:]:
        if type(handler.formatter).__module__ == "pdlaunch.observe.logs":
            root.removeHandler(handler)
            logging.captureWarnings(False)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


TESTS = Path(__file__).parent
E2E = "tests/e2e/"
LATE = [
    f"{E2E}test_{name}.py"
    for name in (
        *("scale", "offload", "sidecar", "pairs", "connectors", "pinned_model"),
        *("doors", "suspects", "hub", "python_api", "sleep"),
    )
]
"""Files of launches that share none with others, the longest first. The workers that are free first
run them at the end, beside the last launches of the other one, so that all end at about the same
time.
"""


MARKS: dict[str, list[pytest.MarkDecorator]] = {
    # Tests run real models, perhaps on a busy machine.
    "e2e": [pytest.mark.e2e, pytest.mark.timeout(900)],
    "netns": [pytest.mark.hosts],
    # The warnings are Ray's own.
    "ray": [pytest.mark.ray, pytest.mark.filterwarnings("default")],
    **{name: [getattr(pytest.mark, name)] for name in ("browser", "prometheus", "slurm")},
}
"""Marks of all tests of a folder, beside ``processes``."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the launches first: the other tests fill the second core meanwhile."""
    for item in items:
        for mark in MARKS.get(item.path.relative_to(TESTS).parts[0], ()):
            item.add_marker(mark)
            item.add_marker(pytest.mark.processes)
    items.sort(key=lambda item: (_place_at_the_end(item), not item.nodeid.startswith(E2E)))


def _place_at_the_end(item: pytest.Item) -> int:
    file = item.nodeid.partition("::")[0]
    return LATE.index(file) if file in LATE else -1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep the tests of a file in one worker, and those launches that are not late, which need both
    cores each.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return E2E if file.startswith(E2E) and file not in LATE else file

    return ByFile(config, log)
