"""The guard of the fast tests bites: a run of pytest over tests that start processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]

TESTS = """
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

def start():
    subprocess.run([sys.executable, "-c", ""])

@pytest.fixture
def child():
    start()

def test_that_runs_python():
    start()

def test_that_does_in_a_thread():
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

def test_with_a_fixture(child):
    pass

def test_that_forks():
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def test_that_asks_a_fork_server():
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()

@pytest.mark.processes
def test_that_says_so():
    start()

def test_that_asks_the_system():
    subprocess.run(["uname"])

def test_after_them():
    pass
"""
"""Five tests that are not allowed before three that are."""


def test_who_starts_a_process_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(TESTS)
    options = ["-p", "tests.process_guard", "-rE", "--rootdir", "."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-o", "markers=processes", "test_example.py"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    failed = [
        line.partition("::")[2].split()[0]
        for line in done.stdout.splitlines()
        if line.startswith("ERROR test_example")
    ]
    assert failed == [
        "test_that_runs_python",
        "test_that_does_in_a_thread",
        "test_with_a_fixture",
        "test_that_forks",
        "test_that_asks_a_fork_server",
    ], done.stdout
    assert "8 passed, 5 errors" in done.stdout
