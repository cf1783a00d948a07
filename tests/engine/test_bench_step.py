"""The step benchmark runs and reports every row; its figures are nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.engine.bench_step import bench_step
from tests.models.tiny import save_tiny_model


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_row_for_prefill_and_one_for_each_batch_size(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    rows = bench_step(directory, batch_sizes=(1, 3), context_tokens=20, num_steps=3, prefill_tokens=50, block_size=4)
    assert [(row.kind, row.batch_size, row.num_tokens) for row in rows] == [
        ("prefill", 1, 50),
        ("decode", 1, 20),
        ("decode", 3, 20),
    ]
    assert all(row.bare_s > 0 and row.engine_s > 0 and row.ratio == row.engine_s / row.bare_s for row in rows)


def test_made_up_weights_need_only_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((save_tiny_model("llama", tmp_path) / "config.json").read_bytes())
    rows = bench_step(tmp_path, batch_sizes=(2,), context_tokens=9, num_steps=2, prefill_tokens=[20, 40], load_format="dummy")
    assert [(row.kind, row.num_tokens) for row in rows] == [("prefill", 20), ("prefill", 40), ("decode", 9)]
