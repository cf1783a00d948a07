"""A pytest plugin that keeps the collector of garbage away from what stays.

Libraries, tests, and what files of tests leave in caches stay to the end. To search them again and
again, and to take them apart when a worker ends, took a fifth of the time.
"""

import atexit
import gc
import os
from collections.abc import Iterator

import pytest

NEW_OBJECTS = 10_000
"""So many are made before those that are new are searched; the default, 700, takes seconds."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # A worker of pytest-xdist that has told of its end need not take its memory apart.
        atexit.register(os._exit, 0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS)
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[object]:
    """Collect the garbage of each file at its end, so that none stays, and no other one has it."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result
