"""The guard of the fast tests bites: a run of pytest over tests that start processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

TESTS = """
import multiprocessing, os, subprocess, sys, threading
import pytest

def start():
    subprocess.run([sys.executable, "-c", ""])

@pytest.fixture
def child():
    start()

def test_bad_in_a_thread():
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

def test_bad_fixture(child):
    pass

def test_bad_fork():
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def test_bad_fork_server():
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()

@pytest.mark.processes
def test_marked():
    start()

def test_small_program():
    subprocess.run(["uname"])
"""


def test_who_starts_a_process_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(TESTS)
    options = ("-p", "tests.process_guard", "-o", "markers=processes", "-rE", "--rootdir", ".")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_example.py"],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    failed = re.findall(r"^ERROR test_example.py::(\w+)", done.stdout, re.MULTILINE)
    assert failed == re.findall(r"def (test_bad_\w+)", TESTS), done.stdout
    assert "6 passed, 4 errors" in done.stdout
