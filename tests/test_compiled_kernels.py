"""Kernels compile for GPUs on machines without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import needs_triton


@needs_triton
@pytest.mark.processes
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """Nothing comes from the cache of a run before."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
