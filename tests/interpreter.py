"""Runs a module of tests of Triton kernels as a program: Triton's interpreter and cache must be
chosen before Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_interpreted(module: str, *parts: Sequence[str]) -> None:
    run_module(module, *parts, TRITON_INTERPRET="1")


def run_module(module: str, *parts: Sequence[str], **environ: str) -> None:
    """Run ``module`` as a program, and fail with its last words if it fails.

    ``parts``: arguments of as many processes of it, which run at the same time; without any it runs
    once.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in parts or ((),)
    ]
    try:
        ended = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), [
        errors[-2000:] for errors in ended
    ]
