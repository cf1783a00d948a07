"""The benchmarks that docs/performance.md names run on a CPU; their figures are not looked at."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offload, step
from tests.engine.models.tiny import save_tiny_model


@pytest.fixture
def rows_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    """Run the main function of a benchmark; return the rows of JSON that it prints."""

    def run(main: Callable[[], None], *arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("more", [[], ["--dummy", "--async-scheduling", "--engine-only"]])
def test_a_row_for_each_prompt_and_each_batch(
    more: list[str], rows_of: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    sizes = ["--batch-sizes", "1,3", "--context-tokens", "20", "--prefill-tokens", "50"]
    small = ["--num-steps", "3", "--block-size", "4", "--buffer-bytes", str(2**20), *more]
    model = str(save_tiny_model("gemma3", tmp_path))
    rows = rows_of(step.main, "--model", model, *sizes, *small)
    found = [(row["kind"], row["batch_size"], row["num_tokens"]) for row in rows]
    assert found == [("prefill", 1, 50), ("decode", 1, 20), ("decode", 3, 20)]
    assert all(row["engine_ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    assert all(bool(row["bare_ms"]) is not bool(more) for row in rows)


def test_a_row_for_one_copy_and_for_each_block_size(
    rows_of: Callable[..., list[dict[str, Any]]],
) -> None:
    sizes = ("--block-sizes", "4KiB,64KiB", "--memory", "256KiB", "--device", "cpu")
    rows = rows_of(offload.main, *sizes)
    assert [row["block_bytes"] for row in rows] == ["one copy", 4096, 65536]
    assert all(row["h2d_gb_per_s"] > 0 and row["d2h_gb_per_s"] > 0 for row in rows)
