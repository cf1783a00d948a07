"""CUDA graphs without a GPU; others run them on one."""

from __future__ import annotations

import pytest

from pdlaunch.engine.step_graphs import batch_sizes


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_hold_every_batch(max_rows: int, sizes: list[int]) -> None:
    assert batch_sizes(max_rows) == sizes
