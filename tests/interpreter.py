"""Runs a module of tests of Triton kernels in Triton's interpreter, which must be chosen before
Triton is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_interpreted(module: str, *parts: Sequence[str], timeout_s: float = 500) -> None:
    """Run ``module`` as a program, and fail with its last words if it fails.

    ``parts``: arguments of as many processes of it, which run at the same time; without any it runs
    once.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in parts or ((),)
    ]
    try:
        ended = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), [
        errors[-2000:] for errors in ended
    ]
