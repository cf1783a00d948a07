"""The benchmark of the host tier's copies runs on a CPU; its figures are not looked at."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.offload import main


def test_a_row_for_one_copy_and_for_each_block_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--block-sizes", "4KiB,64KiB", "--memory", "256KiB", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["offload", *sizes])
    main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["block_bytes"] for row in rows] == ["one copy", 4096, 65536]
    assert all(row["h2d_gb_per_s"] > 0 and row["d2h_gb_per_s"] > 0 for row in rows)
    assert rows[1]["both_gb_per_s"] > 0
