"""From the setting to a rank's host memory and the record of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
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


def num_blocks(host_memory: int) -> int | None:
    spec = make_spec("unused", kv_offload={"host_memory": host_memory})
    worker = new_offload_worker(spec, RUNNER, progress=ignore_progress, wake=lambda: None)
    planner = new_offload_planner(spec, RUNNER, worker)
    if worker is not None:
        worker.close()
    return None if planner is None else planner.tier.num_blocks


def test_the_tier_is_as_large_as_the_memory() -> None:
    assert num_blocks(0) is None
    assert num_blocks(10 * 4096 + 1) == 10
    with pytest.raises(ConfigError, match="holds no block of 4096 bytes") as caught:
        num_blocks(4095)
    assert caught.value.field == "kv_offload.host_memory"
