"""Runs a module of tests of Triton kernels as a program: Triton's interpreter and cache must be
chosen before Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_module(module: str, **environ: str) -> None:
    """Run ``module`` as a program, and fail with its last words if it fails."""
    ended = subprocess.run(
        (sys.executable, "-m", module),
        env=os.environ | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
