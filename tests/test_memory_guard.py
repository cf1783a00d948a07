"""The guard of the suite's memory bites: runs of pytest over small files that need too much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]

GREEDY = """
import pytest

kept = []
pages = []
num_bytes = 4096

def fill(mib):
    return [b"x" * num_bytes for _ in range(mib << 8)]

@pytest.fixture
def data():
    return b"x" * (100 << 20)

def test_that_keeps_it():
    kept.append(b"x" * (100 << 20))

def test_that_frees_it():
    assert len(b"x" * (100 << 20))

def test_with_a_fixture(data):
    assert data

def test_within_the_limit():
    kept.append(b"x" * (30 << 20))

def test_that_leaves_free_memory_to_the_allocator():
    pages.append(fill(50)[-1])

def test_that_takes_it():
    assert fill(100)

def test_that_loads_a_library():
    import triton
"""
"""Three tests that are allowed between four that are not."""

MANY = """
import pytest

kept = []

@pytest.mark.parametrize("index", range(4))
def test_one(index):
    kept.append(b"x" * (40 << 20))

def test_last():
    kept.clear()
"""

TEXTS = """
from hypothesis import given, strategies

@given(strategies.text())
def test_of_any_text(text):
    assert len(text) >= 0
"""


def run_pytest(tmp_path: Path, code: str, option: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_example.py").write_text(code)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.memory_guard",
            "-rEF",
            "-o",
            option,
            "--rootdir",
            ".",
            "test_example.py",
        ],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_test_that_adds_too_much_fails(tmp_path: Path) -> None:
    """Whatever becomes of the memory, and whoever had it before; the first import of a library is
    not the test's doing.
    """
    (tmp_path / "triton.py").write_text("data = b'x' * (100 << 20)")
    done = run_pytest(tmp_path, GREEDY, "memory_growth_limit_mib=64")
    failed = [
        line.partition("::")[2].split()[0]
        for line in done.stdout.splitlines()
        if line.startswith("ERROR test_example")
    ]
    assert failed == [
        "test_that_keeps_it",
        "test_that_frees_it",
        "test_with_a_fixture",
        "test_that_takes_it",
    ], done.stdout
    assert done.returncode == 1
    assert "test_example.py::test_that_keeps_it added 100 MiB" in done.stdout
    assert "64 MiB are allowed" in done.stdout


def test_a_run_that_needs_too_much_fails(tmp_path: Path) -> None:
    """Also when no test alone needs much, and all is given back before the end."""
    done = run_pytest(tmp_path, MANY, "memory_limit_mib=160")
    assert done.returncode == 1, done.stdout
    assert "5 passed" in done.stdout
    assert "160 MiB are allowed" in done.stdout
    assert run_pytest(tmp_path, MANY, "memory_limit_mib=400").returncode == 0


def test_the_table_of_characters_is_no_test_s_doing(tmp_path: Path) -> None:
    """In a folder that has none yet, as in a fresh clone."""
    done = run_pytest(tmp_path, TEXTS, "memory_growth_limit_mib=64")
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.glob(".hypothesis/unicode_data/*/*"))
