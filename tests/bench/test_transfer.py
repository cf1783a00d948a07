"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pdlaunch.bench.transfer.pulls import bench_transfer
from pdlaunch.errors import ConfigError


@pytest.mark.processes
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
    command = [sys.executable, "-m", "pdlaunch.bench", json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
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
        assert row["read_gb_per_s"] >= row["unverified_gb_per_s"]


def test_cumem_pools_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="cumem allocator is not supported") as raised:
        bench_transfer(num_blocks=(1,), enable_cumem_allocator=True)
    assert raised.value.field == "enable_cumem_allocator"


def test_more_blocks_than_there_is_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks: 1000000000 need .* TiB, this machine has"):
        bench_transfer(num_blocks=[10**9])
