"""CUDA graphs without a GPU; others run them on one."""

from __future__ import annotations

import pytest

from pdlaunch.engine.models.step_inputs import GraphShape
from pdlaunch.engine.step_graphs import batch_sizes, capture_all, token_sizes


def test_capture_says_which_graph_comes_next_and_how_much_is_done() -> None:
    events: list[object] = []
    shapes = [GraphShape(1, 1), GraphShape(8, 8), GraphShape(9, 16, 2)]

    def capture(shape: GraphShape) -> str:
        events.append(shape)
        return f"graph of {shape.num_tokens}"

    graphs = capture_all(
        shapes, capture, lambda text, fraction: events.append((text, round(fraction or 0.0, 2)))
    )
    assert events == [
        ("capturing CUDA graphs, tokens with prompts: 16", 0.0),
        shapes[2],
        ("capturing CUDA graphs, decode rows: 8", 0.33),
        shapes[1],
        ("capturing CUDA graphs, decode rows: 1", 0.67),
        shapes[0],
    ]
    assert graphs == {shape: f"graph of {shape.num_tokens}" for shape in shapes}


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_hold_every_batch(max_rows: int, sizes: list[int]) -> None:
    assert batch_sizes(max_rows) == sizes


@pytest.mark.parametrize("max_tokens", [0, 1, 16, 40, 100, 700, 1024])
def test_sizes_with_prompts_hold_every_step_with_little_padding(max_tokens: int) -> None:
    sizes = token_sizes(max_tokens)
    assert sizes == sorted({*sizes})
    assert sizes[-1:] == [max_tokens] * (max_tokens > 0)
    for needed in range(64, max_tokens + 1):
        assert next(size for size in sizes if size >= needed) <= 1.125 * needed
