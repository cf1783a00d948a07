"""A pytest plugin that holds the suite to its memory: one limit for each process of pytest, one for
what each test adds.

A test is judged by the peak from its setup to its teardown, so that memory which is freed in time
counts as well. Loading a big library is not the test's doing: the test in which one is imported for
the first time is not judged, nor are tests on a GPU, which load CUDA's libraries. Hypothesis works
out a table of all characters once a clone, in 200 MiB: before the first test.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1024**2
HEAVY_LIBRARIES = ("torch", "transformers", "triton", "nixl", "mooncake")
TRIM_BYTES = 32 * MIB
"""By how much memory may grow before free memory of the allocator is given back; what lies there
hides as much growth.
"""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("memory_limit_mib", "resident memory of the pytest process", default="2048")
    parser.addini(
        "memory_growth_limit_mib",
        "resident memory that one test may add at its peak",
        default="200",
    )


def pytest_configure(config: pytest.Config) -> None:
    if sys.platform == "linux":
        limit_bytes, growth_limit_bytes = (
            int(config.getini(name)) * MIB
            for name in ("memory_limit_mib", "memory_growth_limit_mib")
        )
        config.pluginmanager.register(MemoryGuard(limit_bytes, growth_limit_bytes), "memory_guard")


class MemoryGuard:
    """Measures every test, and the whole run."""

    def __init__(self, limit_bytes: int, growth_limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._growth_limit_bytes = growth_limit_bytes
        self._peak_bytes = 0
        """Of the whole run, but for what came since the last reset."""
        self._before_bytes = 0
        self._trimmed_bytes = 0
        self._libraries: set[str] = set()
        self._trim = ctypes.CDLL(None).malloc_trim

    def pytest_collection_finish(self) -> None:
        if "hypothesis" in sys.modules:
            from hypothesis import strategies

            strategies.text().validate()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        del item
        self._begin()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        growth_bytes = _status_bytes("VmHWM") - self._before_bytes
        is_judged = _heavy_libraries() == self._libraries and item.get_closest_marker("gpu") is None
        if growth_bytes > self._growth_limit_bytes and is_judged:
            pytest.fail(
                f"{item.nodeid} added {growth_bytes // MIB} MiB to the memory of this process, "
                f"{self._growth_limit_bytes // MIB} MiB are allowed: give it smaller tensors and "
                "inputs",
                pytrace=False,
            )
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Counts a worker of pytest-xdist that has ended; one that crashed has left no figure."""
        peak_bytes = getattr(node, "workeroutput", {}).get("peak_bytes", 0)
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["peak_bytes"] = self._peak()
        elif self._is_too_large() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        peak_bytes = self._peak()
        text = (
            f"peak memory of the pytest process: {peak_bytes // MIB} MiB, "
            f"{self._limit_bytes // MIB} MiB are allowed"
        )
        if self._is_too_large():
            terminalreporter.section("memory", red=True)
            terminalreporter.write_line(f"FAILED: {text}", red=True)
        else:
            terminalreporter.write_line(text)

    def _begin(self) -> None:
        self._libraries = _heavy_libraries()
        self._peak_bytes = self._peak()
        if _status_bytes("VmRSS") > self._trimmed_bytes + TRIM_BYTES:
            self._trim(0)
            self._trimmed_bytes = _status_bytes("VmRSS")
        _CLEAR_REFS.write_text(_RESET_PEAK)
        self._before_bytes = _status_bytes("VmRSS")

    def _is_too_large(self) -> bool:
        """A run on a GPU is not judged: CUDA's libraries alone take about a gigabyte."""
        return self._peak() > self._limit_bytes and not _uses_cuda()

    def _peak(self) -> int:
        """Since the process has started; since the last reset it is what the kernel knows."""
        return max(self._peak_bytes, _status_bytes("VmHWM"))


def _uses_cuda() -> bool:
    """Say whether this process has a CUDA context."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _heavy_libraries() -> set[str]:
    """Those that are loaded."""
    return {name for name in HEAVY_LIBRARIES if name in sys.modules}


def _status_bytes(field: str) -> int:
    """``VmRSS``: resident now; ``VmHWM``: the most since the last reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
