"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys


def test_rows_of_a_small_benchmark() -> None:
    arguments = {
        "connectors": ["nixl", "file"],
        "tp_pairs": [[1, 1]],
        "num_blocks": [2, 8],
        "num_repeats": 1,
        "num_layers": 2,
        "head_dim": 8,
    }
    command = [sys.executable, "-m", "pdlaunch.transfer.bench_transfer", json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["connector"], row["num_blocks"]) for row in rows] == [("nixl", 2), ("nixl", 8), ("file", 2), ("file", 8)]
    for row in rows:
        assert row["tp_pair"] == "1x1"
        assert row["unverified_gb_per_s"] >= 0
        assert row["pull_gb_per_s"] >= 0
        assert (row["ratio"] is None) == (row["connector"] == "file")
