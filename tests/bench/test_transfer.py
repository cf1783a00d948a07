"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

from __future__ import annotations

import json

import pytest

from pdlaunch.bench.transfer import TransferOptions, bench_transfer
from pdlaunch.cli.bench import run_module
from pdlaunch.errors import ConfigError


@pytest.mark.processes
def test_rows_of_a_small_benchmark(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "connectors": ["nixl", "file"],
        "paths": ["nixl", "p2p"],
        "num_blocks": [2],
        "num_repeats": 1,
        "num_layers": 2,
        "head_dim": 8,
    }
    rows = json.loads(run_module("pdlaunch.bench.transfer", json.dumps(arguments)))
    assert "Warning" not in capfd.readouterr().err
    assert [(row["connector"], row["path"]) for row in rows] == [
        ("nixl", "nixl/UCX"),
        ("nixl", "p2p/memfd"),
        ("file", "file/safetensors"),
    ]
    for row in rows:
        assert row["unverified_gb_per_s"] >= 0
        assert row["pull_gb_per_s"] >= 0
        assert row["read_gb_per_s"] >= row["unverified_gb_per_s"]


def test_more_blocks_than_there_is_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks: 1000000000 need .* TiB, this machine has"):
        bench_transfer(TransferOptions(num_blocks=[10**9]))
