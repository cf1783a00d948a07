"""Loads and stores of the host tier, as the scheduler sees them.

    load    find ─▶ start ─▶ in flight ─┬─ ok ──────────────────────▶ the request's
                                        ├─ ok, the rest is pulled ──▶ cached
                                        └─ failed, or nobody waits ─▶ free
    store   full blocks ─▶ held by the copy ─▶ held no more

Every rank executes the jobs (``offload/worker.py``); each ends in exactly one report here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pdlaunch.engine.kvcache.manager import KVCacheManager
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.planner import HostHit, OffloadPlanner
from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import EngineStats


@dataclass(slots=True)
class HostLoad:
    """Describes blocks on their way from host memory."""

    request: Request | None
    """The request that waits for these blocks; None once it has ended."""
    hit: HostHit
    """The hit; ``request`` shares its device blocks until the load ends."""
    block_ids: list[list[int]]
    """Blocks to load into, by group; they follow the device blocks of ``hit``."""


class HostLoads:
    """Knows which requests wait for loads, and which blocks loads and stores use.

    ``planner`` is None where there is no host tier: then nothing is found or stored.
    """

    def __init__(
        self, kv: KVCacheManager, planner: OffloadPlanner | None, counts: EngineStats
    ) -> None:
        """``counts``: the engine's totals, to which it adds."""
        self._kv = kv
        self._planner = planner
        self._counts = counts
        self._loads: dict[int, HostLoad] = {}
        self._jobs: list[OffloadJob] = []

    def find(self, request: Request, max_blocks: int) -> HostHit | None:
        """Return the blocks that host memory has and the device lacks, None if there are none.

        It looks at the first ``max_blocks`` logical blocks: for the longest prefix from which the
        request can compute on or, before a pull, for what the pull would bring.
        """
        if self._planner is None or not request.may_load:
            return None
        hashes, find_on_device = request.hasher.block_hashes, self._kv.pool.find
        if request.wants_pull:
            return self._planner.find_for_pull(
                hashes, max_blocks, request.num_pulled_tokens, find_on_device
            )
        return self._planner.find(hashes, max_blocks, find_on_device)

    def is_waited_for(self, hit: HostHit) -> bool:
        """Return whether another request waits for a part of ``hit``, which it will leave in the
        prefix cache.
        """
        wanted = {chunk_id for chunk_ids in hit.chunk_ids for chunk_id in chunk_ids}
        return any(
            load.request is not None and not wanted.isdisjoint(chunk_ids)
            for load in self._loads.values()
            for chunk_ids in load.hit.chunk_ids
        )

    def start(self, request: Request, hit: HostHit) -> None:
        """Share the hit's device blocks and load the others; the caller has looked for room."""
        assert self._planner is not None
        self._kv.share_hit(hit.device)
        counts = [hit.num_blocks_to_load(group) for group in range(len(hit.chunk_ids))]
        block_ids = [self._kv.pool.allocate_for_pull(count) for count in counts]
        job = self._planner.begin_load(hit, block_ids, request.hasher.block_hashes)
        self._loads[job.job_id] = HostLoad(request, hit, block_ids)
        request.load_id = job.job_id
        self._jobs.append(job)

    def cancel(self, request: Request) -> None:
        """Free the shared blocks of a waiting request that has ended; the load keeps its own until
        it ends.
        """
        assert request.load_id is not None
        load = self._loads[request.load_id]
        load.request = None
        self._kv.release_hit(load.hit.device)

    def store(self, request: Request, blocks: range) -> None:
        """Copy these logical blocks out, as far as host memory lacks them; all their tokens are
        computed.
        """
        if self._planner is None or not blocks:
            return
        hashes = request.hasher.block_hashes
        for job in self._planner.begin_stores(request.tables, hashes, blocks.start, blocks.stop):
            self._kv.pool.share(job.block_ids)
            self._jobs.append(job)

    def finish(self, report: JobFinished) -> HostLoad | None:
        """Move a job's blocks to where they belong now; returns the load, if it was one. Unknown
        ids are ignored.
        """
        job = None if self._planner is None else self._planner.finish(report)
        if job is None:
            return None
        counts = self._counts
        if job.direction == "store":
            counts.offload_stores += 1
            counts.offload_stored_bytes += report.num_bytes
            counts.offload_stored_seconds += report.seconds
            counts.offload_store_failures += not report.ok
            # Reversed, so that the tail of a prompt is reused before its head.
            self._kv.pool.release(reversed(job.block_ids))
            return None
        counts.offload_loads += 1
        counts.offload_loaded_bytes += report.num_bytes
        counts.offload_loaded_seconds += report.seconds
        counts.offload_load_failures += not report.ok
        counts.offload_bad_blocks += len(report.failed_chunk_ids)
        load = self._loads.pop(job.job_id)
        request, device = load.request, load.hit.device
        if request is not None:
            request.load_id = None
            # Whatever came of it: looking again would find the same blocks, or fail in the same
            # way.
            request.may_load = False
        if request is not None and report.ok and not request.wants_pull:
            self._kv.adopt_pulled(request.tables, device, load.block_ids)
            return load
        for group, block_ids in enumerate(load.block_ids):
            if request is None or not report.ok:
                self._kv.pool.drop_pull(block_ids)
                continue
            # They go to the prefix cache, where the pull of the others finds them. A block can be
            # registered only while it has an owner.
            self._kv.pool.finish_pull(block_ids)
            for index, block_id in enumerate(block_ids, device.end(group)):
                self._kv.pool.register(block_id, group, request.hasher.block_hashes[index])
            self._kv.pool.release(reversed(block_ids))
        if request is not None:
            self._kv.release_hit(device)
        return load

    @property
    def has_jobs(self) -> bool:
        """Return whether ``take_jobs`` has something."""
        return bool(self._jobs)

    def take_jobs(self) -> list[OffloadJob]:
        """Return the jobs that the ranks have not been told of, oldest first."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def frees_blocks_soon(self) -> bool:
        """Return whether blocks become free when copies end, without anybody giving them up.

        Waiting for these is better than preempting a request.
        """
        return any(
            self._kv.pool.num_owners(block_id) == num_copies
            for block_id, num_copies in Counter(self.held_ids()).items()
        )

    def shared_ids(self) -> Iterator[int]:
        """Yield the blocks that waiting requests share."""
        for load in self._loads.values():
            if load.request is not None:
                for block_ids in load.hit.device.block_ids:
                    yield from block_ids

    def loading_ids(self) -> Iterator[int]:
        """Return the blocks to which loads may write."""
        return iter(()) if self._planner is None else self._planner.block_ids_in_flight("load")

    def held_ids(self) -> Iterator[int]:
        """Return the blocks that stores read."""
        return iter(()) if self._planner is None else self._planner.block_ids_in_flight("store")

    def add_to(self, stats: EngineStats) -> EngineStats:
        """Return ``stats`` with what is in the tier now."""
        if self._planner is None:
            return stats
        tier = self._planner.tier
        return msgspec.structs.replace(
            stats,
            num_host_blocks=tier.num_chunks,
            num_used_host_blocks=tier.num_used_chunks,
            num_offload_jobs=self._planner.num_jobs,
            offload_evicted_blocks=tier.num_evicted_chunks,
            offload_refused_blocks=tier.num_refused_chunks,
        )

    def check_integrity(self) -> None:
        """Prove that the tier's entries are those of the jobs. Raises AssertionError."""
        if self._planner is not None:
            self._planner.check_integrity()
