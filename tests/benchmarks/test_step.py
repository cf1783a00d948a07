"""The step benchmark reports every row; its figures are not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.step import main
from tests.engine.models.tiny import save_tiny_model


@pytest.mark.parametrize("more", [[], ["--dummy", "--async-scheduling", "--engine-only"]])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_row_for_each_prompt_and_each_batch(
    name: str,
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--batch-sizes", "1,3", "--context-tokens", "20", "--prefill-tokens", "50"]
    small = ["--num-steps", "3", "--block-size", "4", "--buffer-bytes", str(2**20), *more]
    model = str(save_tiny_model(name, tmp_path))
    monkeypatch.setattr(sys, "argv", ["step", "--model", model, *sizes, *small])
    main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(row["kind"], row["batch_size"], row["num_tokens"]) for row in rows]
    assert found == [("prefill", 1, 50), ("decode", 1, 20), ("decode", 3, 20)]
    assert all(row["engine_ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    assert all(bool(row["bare_ms"]) is not bool(more) for row in rows)
