"""Build what a rank needs for the host tier: memory and copies; on rank 0 the planner, too."""

from __future__ import annotations

from collections.abc import Callable

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.offload.host_memory import AllocationProgress
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.offload.tier import HeadSlice, HostTier
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.transfer.connectors.opening import rank_part
from pdlaunch.transfer.integrity.checksum import KVHasher


def new_offload_worker(
    spec: EngineSpec, runner: ModelRunner, *, progress: AllocationProgress, wake: Callable[[], None]
) -> OffloadWorker | None:
    """Take the rank's host memory; None without ``kv_offload``.

    Raises ConfigError when there is too little.
    """
    if not spec.kv_offload.host_memory:
        return None
    make_worker = rank_part(OffloadWorker, spec.kv_transfer)
    first = runner.first_kv_head
    # With a hasher of its own: that of the transfer thread is for that thread alone.
    return make_worker(
        kv_cache=runner.kv_cache,
        layout=runner.layout,
        heads=HeadSlice(first, first + runner.layout.num_kv_heads),
        host_memory_bytes=spec.kv_offload.host_memory,
        blocks_per_chunk=spec.blocks_per_chunk,
        device_hasher=KVHasher(runner.kv_cache, runner.layout) if runner.kv_cache.is_cuda else None,
        progress=progress,
        wake=wake,
    )


def new_offload_planner(
    spec: EngineSpec, runner: ModelRunner, worker: OffloadWorker | None
) -> OffloadPlanner | None:
    """Return the planner of an engine whose ranks have such workers; its tier is empty."""
    if worker is None:
        return None
    # All heads, where a rank's worker names its own: the tier speaks for the whole engine.
    tier = HostTier(worker.num_chunks, HeadSlice(0, runner.shape.num_kv_heads))
    return OffloadPlanner(
        runner.layout.groups, spec.block_size, tier, blocks_per_chunk=spec.blocks_per_chunk
    )
