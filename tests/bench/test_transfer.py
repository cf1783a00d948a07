"""The benchmark runs, and its rows say what was asked for. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pdlaunch.bench.transfer.bare import parts_of
from pdlaunch.bench.transfer.pulls import TURN, bench_transfer
from pdlaunch.bench.transfer.shape import BenchShape
from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
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
        beside_bare = {
            "bare_gb_per_s",
            "bare_loop_gb_per_s",
            "read_ratio",
            "read_loop_ratio",
            "pull_ratio",
        }
        assert {name for name, value in row.items() if value is None} == (
            beside_bare if row["connector"] == "file" else set()
        )


@pytest.mark.processes
def test_what_is_compared_follows_the_same() -> None:
    assert TURN[TURN.index("unverified") - 1] == TURN[TURN.index("bare") - 1]


def test_cumem_pools_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="cumem allocator is not supported") as raised:
        bench_transfer(num_blocks=(1,), enable_cumem_allocator=True)
    assert raised.value.field == "enable_cumem_allocator"


def test_more_blocks_than_there_is_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks: 1000000000 need .* TiB, this machine has"):
        bench_transfer(num_blocks=[10**9])


@pytest.mark.parametrize("pair", [(1, 1), (1, 3), (3, 1), (3, 3), (6, 3)])
@pytest.mark.parametrize("by_head", [True, False])
def test_bare_loops_move_each_head_of_each_block_once(pair, by_head):
    shape = BenchShape(
        num_blocks=8, num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, dtype="float32"
    )
    head_bytes = shape.layout().head_bytes
    caches = [
        [
            shape.new_cache(PrivateKVMemory(), tp_size).view(torch.uint8).view(-1)
            for _ in range(tp_size)
        ]
        for tp_size in pair
    ]
    local, remote = [5, 0, 2], [1, 7, 4]
    parts = parts_of(shape, pair, local, remote, by_head=by_head)
    if by_head and pair[0] != pair[1]:
        assert {part.piece_bytes for part in parts} == {head_bytes}
    holders, readers = caches
    for part in parts:
        for here, there in zip(part.local, part.remote, strict=True):
            readers[part.decode_rank][here : here + part.piece_bytes] = holders[part.prefill_rank][
                there : there + part.piece_bytes
            ]
    replicas = max(1, pair[0] // 3)
    ours = torch.cat([cache.view(8, -1, head_bytes)[local] for cache in readers], dim=1)
    theirs = torch.cat(
        [cache.view(8, -1, head_bytes)[remote] for cache in holders[::replicas]], dim=1
    )
    assert torch.equal(ours, theirs)
