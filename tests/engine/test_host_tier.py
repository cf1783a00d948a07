"""From the setting to a rank's host memory and the record of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.rank import new_offload_planner, new_offload_worker
from pdlaunch.errors import ConfigError
from tests.engine.hand_scheduler import ignore_progress, make_spec

LAYOUT = KVCacheLayout(
    make_groups([None, 8]), num_kv_heads=2, head_dim=4, block_size=4, dtype_bytes=4
)
RUNNER: Any = SimpleNamespace(
    layout=LAYOUT,
    kv_cache=torch.zeros((6, *LAYOUT.block_shape())),
    first_kv_head=2,
    shape=SimpleNamespace(num_kv_heads=4),
)


def num_chunks(host_memory: int) -> int | None:
    spec = make_spec("unused", kv_offload={"host_memory": host_memory})
    worker = new_offload_worker(spec, RUNNER, progress=ignore_progress, wake=lambda: None)
    planner = new_offload_planner(spec, RUNNER, worker)
    if worker is not None:
        worker.close()
    return None if planner is None else planner.tier.num_chunks


def test_the_tier_is_as_large_as_the_memory() -> None:
    assert num_chunks(0) is None
    assert num_chunks(10 * 4096 + 1) == 10
    with pytest.raises(ConfigError, match="holds no chunk of 4096 bytes") as caught:
        num_chunks(4095)
    assert caught.value.field == "kv_offload.host_memory"


def test_the_planner_counts_in_the_chunks_of_the_ranks() -> None:
    worker: Any = SimpleNamespace(num_chunks=10)
    spec = make_spec("unused", kv_offload={"host_memory": 1}, blocks_per_chunk=16)
    planner = new_offload_planner(spec, RUNNER, worker)
    assert planner is not None
    tables = BlockTables(2)
    tables.append([0, 20], [list(range(40)), list(range(40, 60))])
    (job,) = planner.begin_stores(tables, [bytes([index]) for index in range(40)], 0, 40)
    assert (job.group_sizes, job.block_indices) == ([32, 12], [0, 20])
    assert job.chunk_hashes == [bytes([15]), bytes([31]), bytes([31])]
