"""From the setting to a rank's host memory and the books of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.rank import new_offload_planner, new_offload_worker
from pdlaunch.errors import ConfigError
from tests.engine.hand_scheduler import ignore_progress, make_spec

LAYOUT = KVCacheLayout(
    make_groups([None, 8]), num_kv_heads=2, head_dim=4, block_size=4, dtype_bytes=4
)


def make_runner() -> Any:
    return SimpleNamespace(
        layout=LAYOUT,
        kv_cache=torch.zeros((6, *LAYOUT.block_shape())),
        first_kv_head=2,
        shape=SimpleNamespace(num_kv_heads=4),
    )


def new_worker(host_memory: int) -> tuple[Any, OffloadWorker | None]:
    spec = make_spec("unused", kv_offload={"host_memory": host_memory})
    return spec, new_offload_worker(
        spec, make_runner(), progress=ignore_progress, wake=lambda: None
    )


def test_without_the_setting_there_is_no_tier() -> None:
    spec, worker = new_worker(0)
    assert worker is None
    assert new_offload_planner(spec, make_runner(), worker) is None


def test_the_tier_is_as_large_as_the_memory() -> None:
    spec, worker = new_worker(10 * 4096 + 1)
    assert worker is not None
    planner = new_offload_planner(spec, make_runner(), worker)
    assert planner is not None
    assert planner.tier.num_chunks == 10
    worker.close()


def test_the_planner_counts_in_the_chunks_of_the_ranks() -> None:
    worker: Any = SimpleNamespace(num_chunks=10)
    spec = make_spec("unused", kv_offload={"host_memory": 1}, blocks_per_chunk=16)
    planner = new_offload_planner(spec, make_runner(), worker)
    assert planner is not None
    tables = BlockTables(2)
    tables.append([0, 20], [list(range(40)), list(range(40, 60))])
    (job,) = planner.begin_stores(tables, [bytes([index]) for index in range(40)], 0, 40)
    assert (job.group_sizes, job.block_indices) == ([32, 12], [0, 20])
    assert job.chunk_hashes == [bytes([15]), bytes([31]), bytes([31])]


def test_too_little_memory_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="holds no chunk of 4096 bytes") as caught:
        new_worker(4095)
    assert caught.value.field == "kv_offload.host_memory"
