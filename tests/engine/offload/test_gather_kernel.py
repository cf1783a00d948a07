"""The copy kernel, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest

from tests.interpreter import needs_triton, run_interpreted


@needs_triton
@pytest.mark.processes
def test_kernel_equals_plain_copies() -> None:
    run_interpreted("tests.engine.offload.interpreted_kernel")
