"""Kernels compile for GPUs on machines without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreter import needs_triton, run_module


@needs_triton
@pytest.mark.processes
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """Nothing comes from the cache of a run before."""
    run_module("tests.compiled_kernels", TRITON_CACHE_DIR=str(tmp_path))
