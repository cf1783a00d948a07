"""What can be said of CUDA graphs without a GPU; ``test_runner`` and ``tests/models`` run them on
one.
"""

from __future__ import annotations

import pytest

from pdlaunch.engine.decode_graphs import batch_sizes, capture_all


def test_capture_says_which_batch_comes_next_and_how_much_is_done() -> None:
    events: list[object] = []

    def capture(size: int) -> str:
        events.append(size)
        return f"graph of {size}"

    graphs = capture_all(
        [1, 2, 4, 8], capture, lambda text, fraction: events.append((text, fraction))
    )
    assert events == [
        ("capturing CUDA graphs, batch of 8", 0.0),
        8,
        ("capturing CUDA graphs, batch of 4", 0.25),
        4,
        ("capturing CUDA graphs, batch of 2", 0.5),
        2,
        ("capturing CUDA graphs, batch of 1", 0.75),
        1,
    ]
    assert graphs == {size: f"graph of {size}" for size in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_hold_every_batch(max_rows: int, sizes: list[int]) -> None:
    assert batch_sizes(max_rows) == sizes
