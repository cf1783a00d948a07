"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys


def test_rows_of_a_small_benchmark() -> None:
    arguments = {
        "connectors": ["nixl", "file"],
        "paths": ["nixl", "p2p"],
        "tp_pairs": [[1, 1]],
        "num_blocks": [2],
        "num_repeats": 1,
        "num_layers": 2,
        "head_dim": 8,
    }
    command = [sys.executable, "-m", "pdlaunch.transfer.bench_transfer", json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["connector"], row["path"]) for row in rows] == [
        ("nixl", "nixl/UCX"),
        ("nixl", "p2p/memfd"),
        ("file", "file/safetensors"),
    ]
    for row in rows:
        assert row["tp_pair"] == "1x1"
        assert row["unverified_gb_per_s"] >= 0
        assert row["pull_gb_per_s"] >= 0
        assert (row["ratio"] is None) == (row["connector"] == "file")
