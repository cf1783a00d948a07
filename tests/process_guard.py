"""A pytest plugin that knows which tests start processes: those with the marker ``processes``.

``make test-fast`` leaves them out. A test without the marker that starts a process of Python, by
whatever means, fails, so that nobody can forget it. Small programs that libraries ask about the
system (``ldconfig``, ``uname``) do not count.
"""

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

MARKER = "processes"
GPU_MARKERS = ("gpu", "multi_gpu")
"""Tests on a GPU may start compilers."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ProcessGuard(), "process_guard")


class ProcessGuard:
    """Fails the tests that start a process and do not say so."""

    def __init__(self) -> None:
        self._started: list[str] = []
        """What the current test has started."""
        sys.addaudithook(self._on_event)
        # A process that a fork server starts is no event of this process.
        start = BaseProcess.start

        def noted_start(process: BaseProcess) -> None:
            self._started.append(f"multiprocessing: {process.name}")
            start(process)

        BaseProcess.start = noted_start  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._started.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        if self._started and not any(map(item.get_closest_marker, (MARKER, *GPU_MARKERS))):
            pytest.fail(
                f"{item.nodeid} started {', '.join(self._started)}: mark it with "
                f"pytest.mark.{MARKER}, or use a fake",
                pytrace=False,
            )
        return result

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            program = Path(str(arguments[0])).name
            if program.startswith(("python", "pdlaunch")):
                self._started.append(program)
        elif event in ("os.fork", "os.forkpty", "os.posix_spawn"):
            self._started.append(event)
