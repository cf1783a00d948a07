"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

import json

import pytest

from pdlaunch.cli.bench import run_module


@pytest.mark.processes
def test_rows_of_a_small_benchmark(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "paths": ["nixl", "p2p", "file"],
        "num_blocks": [2],
        "num_repeats": 1,
        "num_layers": 2,
        "head_dim": 8,
    }
    rows = json.loads(run_module("pdlaunch.bench.transfer", json.dumps(arguments)))
    assert "Warning" not in capfd.readouterr().err
    nixl, *others = [row["path"] for row in rows]
    assert nixl in ("nixl/UCX (cma)", "nixl/UCX (posix)")
    assert others == ["p2p/memfd", "file/safetensors"]
    for row in rows:
        assert row["unverified_gb_per_s"] >= 0
        assert row["pull_gb_per_s"] >= 0
        assert row["read_gb_per_s"] >= row["unverified_gb_per_s"]
