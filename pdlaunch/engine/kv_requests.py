"""Leases, pulls and copies of an engine: which blocks they own, and the commands that start them.

    lease   running ─ grant ─▶ leased ─ LeaseEnded ─▶ free
    pull    start ─▶ in flight ─┬─ ok ──────────────────────────▶ the request's
                                ├─ failed ──────────────────────▶ free
                                └─ failed, READ may still write ▶ quarantined ─ PullDrained ─▶ free
    load    find ─▶ start ─▶ in flight ─┬─ ok ──────────────────▶ the request's
    (from host memory)                  ├─ ok, the rest is pulled ▶ cached
                                        └─ failed, or nobody waits ▶ free
    store   full blocks ─▶ owned by the copy, too ─▶ released

The ranks' transfer threads own every deadline. Each lease, pull and copy ends in exactly one event
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import msgspec

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.kvcache.manager import KVCacheManager, PrefixHit
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.planner import HostHit, OffloadPlanner
from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import EngineStats, FinishReason
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, lease_of
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.transfer import CancelPull, GrantLease, PullFinished, StartPull


class BlockLeases:
    """Holds the blocks of finished requests that decode engines may pull.

    ``local``: engine_id, host, port and tp_size of this engine.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        settings: KVTransferSettings,
        local: tuple[EngineId, str, int, int],
    ) -> None:
        self._kv = kv
        self._lease_s = settings.lease_s
        self._local = local
        self._block_ids: dict[LeaseId, list[list[int]]] = {}

    def __len__(self) -> int:
        return len(self._block_ids)

    def __contains__(self, lease_id: LeaseId) -> bool:
        return lease_id in self._block_ids

    def grant(self, request: Request, reason: FinishReason) -> tuple[GrantLease, RemoteKV] | None:
        """Keep the prompt's blocks of a request that ends now, if another engine may decode on.

        A stopped choice gets a lease too if there are others, which may go on; the server ends a
        lease that nobody needs. The request's other blocks are freed.
        """
        num_readers = request.message.num_readers
        # It ends with its first token, so that no later step can still write to the blocks that are
        # leased.
        assert not (request.message.do_remote_decode and request.num_in_flight)
        if (
            not request.message.do_remote_decode
            or num_readers < 1
            or (reason == "stop" and num_readers == 1)
        ):
            return None
        lease_id, num_tokens = lease_of(request.request_id), request.num_prompt_tokens
        leased = self._kv.lease(request.tables, num_tokens)
        self._block_ids[lease_id] = leased.block_ids
        grant = GrantLease(
            lease_id=lease_id,
            block_ids=leased.block_ids,
            first_block_index=leased.first,
            block_hashes=request.prompt_hashes(),
            num_tokens=num_tokens,
            num_readers=num_readers,
            lease_s=self._lease_s,
        )
        engine_id, host, port, tp_size = self._local
        remote = RemoteKV(
            engine_id=engine_id,
            lease_id=lease_id,
            host=host,
            port=port,
            block_ids=leased.block_ids,
            num_tokens=num_tokens,
            tp_size=tp_size,
            lease_s=self._lease_s,
        )
        return grant, remote

    def ended(self, lease_id: LeaseId) -> None:
        """Free the blocks. Unknown ids are ignored."""
        # Full ones stay in the prefix cache until they are needed; reversed, so that the tail of a
        # prompt is reused before its head: without the head nobody finds the tail.
        for block_ids in self._block_ids.pop(lease_id, []):
            self._kv.pool.release(reversed(block_ids))

    def all_ids(self) -> Iterator[int]:
        """Yield each block once for each lease on it."""
        for groups in self._block_ids.values():
            for block_ids in groups:
                yield from block_ids


@dataclass(slots=True)
class Incoming:
    """Describes blocks to which a pull or a load may write."""

    request: Request | None
    """The request that waits for them; None once it has ended, or if nobody ever did."""
    hit: PrefixHit  # cached blocks that ``request`` shares meanwhile
    block_ids: list[list[int]]  # blocks to write to, by group; they follow those of ``hit``


class IncomingBlocks:
    """Holds what pulls or loads in flight own, by their ids."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self.in_flight: dict[Hashable, Incoming] = {}
        self._quarantined: dict[Hashable, list[list[int]]] = {}

    def take(self, hit: PrefixHit, counts: list[int]) -> list[list[int]]:
        """Share ``hit``, take ``counts`` blocks by group and list them in ``in_flight``."""
        self._kv.share_hit(hit)
        return [self._kv.pool.allocate_for_pull(count) for count in counts]

    def leave(self, key: Hashable) -> None:
        """Free the shared blocks of a request that has ended; the others wait for ``end``."""
        incoming = self.in_flight[key]
        incoming.request = None
        self._kv.release_hit(incoming.hit)

    def end(self, key: Hashable, *, ok: bool, writes: bool = False) -> Incoming | None:
        """Give the blocks to the request, or free them unless something ``writes`` to them."""
        incoming = self.in_flight.pop(key, None)
        if incoming is None:
            return None
        request, pool = incoming.request, self._kv.pool
        if ok and request is not None:
            self._kv.adopt_pulled(request.tables, incoming.hit, incoming.block_ids)
            return incoming
        for block_ids in incoming.block_ids:
            (pool.quarantine if writes else pool.drop_pull)(block_ids)
        if writes:
            self._quarantined[key] = incoming.block_ids
        if request is not None:
            self._kv.release_hit(incoming.hit)
        return incoming

    def drained(self, key: Hashable) -> None:
        """Free quarantined blocks, to which nothing can write any more. Unknown ids are ignored."""
        for block_ids in self._quarantined.pop(key, []):
            self._kv.pool.drain(block_ids)

    def shared_ids(self) -> Iterator[int]:
        """Yield the blocks that waiting requests share."""
        for incoming in self.in_flight.values():
            if incoming.request is not None:
                for block_ids in incoming.hit.block_ids:
                    yield from block_ids

    def written_ids(self) -> Iterator[int]:
        for incoming in self.in_flight.values():
            for block_ids in incoming.block_ids:
                yield from block_ids

    def quarantined_ids(self) -> Iterator[int]:
        for groups in self._quarantined.values():
            for block_ids in groups:
                yield from block_ids


class BlockPulls:
    """Starts and ends pulls from other engines."""

    def __init__(self, kv: KVCacheManager, settings: KVTransferSettings) -> None:
        self._kv = kv
        self._settings = settings
        self.blocks = IncomingBlocks(kv)
        self._num_started = 0

    def is_waited_for(self, request: Request) -> bool:
        """Return whether another choice of the same prompt waits for a pull from the same lease."""
        source = _source_of(request)
        return any(
            pull.request is not None and _source_of(pull.request) == source
            for pull in self.blocks.in_flight.values()
        )

    def start(self, request: Request, hit: PrefixHit) -> StartPull | None:
        """Share ``hit`` and pull the prompt's other blocks; None if no block is missing."""
        num_logical = self._kv.num_logical_blocks(request.num_prompt_tokens)
        ends = [hit.end(group) for group in range(self._kv.num_groups)]
        if min(ends) == num_logical:
            return None
        block_ids = self.blocks.take(hit, [num_logical - end for end in ends])
        command = self._begin(request, Incoming(request, hit, block_ids), ends)
        request.pull_id = command.pull_id
        return command

    def tell_prefill_side(self, request: Request) -> StartPull:
        """Pull nothing, which tells the prefill side that this reader no longer needs the lease."""
        num_groups = self._kv.num_groups
        # No group wants a block: each begins where the prompt ends.
        end = self._kv.num_logical_blocks(request.num_prompt_tokens)
        nothing = Incoming(None, PrefixHit([], []), [[]] * num_groups)
        return self._begin(request, nothing, [end] * num_groups)

    def cancel(self, request: Request) -> CancelPull:
        """End the pull of a request that has ended; it keeps its own blocks until it ends."""
        assert request.pull_id is not None
        self.blocks.leave(request.pull_id)
        return CancelPull(pull_id=request.pull_id)

    def finish(self, event: PullFinished) -> Incoming | None:
        """Move the pull's blocks to where they belong now. None when the id is unknown."""
        pull = self.blocks.end(event.pull_id, ok=event.ok, writes=event.in_flight)
        if pull is not None and pull.request is not None:
            pull.request.pull_id = None
        return pull

    def _begin(self, request: Request, pull: Incoming, first_block_index: list[int]) -> StartPull:
        pull_id = PullId(f"pull-{self._num_started}")
        self._num_started += 1
        self.blocks.in_flight[pull_id] = pull
        remote = request.message.remote_kv
        assert remote is not None
        return StartPull(
            pull_id=pull_id,
            request_id=request.request_id,
            remote=remote,
            block_ids=pull.block_ids,
            first_block_index=first_block_index,
            block_hashes=request.prompt_hashes(),
            num_tokens=request.num_prompt_tokens,
            timeout_s=self._settings.pull_timeout_s,
            num_attempts=self._settings.pull_attempts,
            records_spans=request.message.records_spans,
        )


def _source_of(request: Request) -> tuple[EngineId, LeaseId]:
    """Return the lease that the request pulls from; choices of one prompt have the same."""
    remote = request.message.remote_kv
    assert remote is not None
    return remote.engine_id, remote.lease_id


class HostLoads:
    """Starts and ends loads from host memory and stores to it.

    ``planner`` is None where there is no host tier: then nothing is found or stored. Every rank
    executes the jobs (``offload/worker.py``).
    """

    def __init__(
        self, kv: KVCacheManager, planner: OffloadPlanner | None, counts: EngineStats
    ) -> None:
        """``counts``: the engine's totals, to which it adds."""
        self._kv = kv
        self._planner = planner
        self._counts = counts
        self.blocks = IncomingBlocks(kv)
        self._chunk_ids: dict[int, set[int]] = {}
        """What loads in flight read."""
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
        """Return whether another request loads a part of ``hit``, which will be cached then."""
        wanted = {chunk_id for chunk_ids in hit.chunk_ids for chunk_id in chunk_ids}
        return any(
            self.blocks.in_flight[job_id].request is not None and not wanted.isdisjoint(chunk_ids)
            for job_id, chunk_ids in self._chunk_ids.items()
        )

    def start(self, request: Request, hit: HostHit) -> None:
        """Share the hit's device blocks and load the others; the caller has looked for room."""
        assert self._planner is not None
        counts = [hit.num_blocks_to_load(group) for group in range(self._kv.num_groups)]
        block_ids = self.blocks.take(hit.device, counts)
        job = self._planner.begin_load(hit, block_ids, request.hasher.block_hashes)
        self.blocks.in_flight[job.job_id] = Incoming(request, hit.device, block_ids)
        self._chunk_ids[job.job_id] = {*job.chunk_ids}
        request.load_id = job.job_id
        self._jobs.append(job)

    def cancel(self, request: Request) -> None:
        """End the load of a request that has ended; it keeps its own blocks until it ends."""
        self.blocks.leave(request.load_id)

    def store(self, request: Request, blocks: range) -> None:
        """Copy these logical blocks, which are full, to host memory as far as it lacks them."""
        if self._planner is None or not blocks:
            return
        hashes = request.hasher.block_hashes
        for job in self._planner.begin_stores(request.tables, hashes, blocks.start, blocks.stop):
            self._kv.pool.share(job.block_ids)
            self._jobs.append(job)

    def finish(self, report: JobFinished) -> Incoming | None:
        """Move a job's blocks to where they belong now; return the load, if it was one."""
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
        del self._chunk_ids[job.job_id]
        request = self.blocks.in_flight[job.job_id].request
        if request is not None:
            request.load_id = None
            # Even after a failure: another look would find the same blocks, or fail in the same
            # way.
            request.may_load = False
            if report.ok and request.wants_pull:
                return self._cache(job.job_id, request)
        return self.blocks.end(job.job_id, ok=report.ok)

    def _cache(self, job_id: int, request: Request) -> Incoming:
        """Put the loaded blocks into the prefix cache, where the pull of the others finds them."""
        load, hashes = self.blocks.in_flight.pop(job_id), request.hasher.block_hashes
        # A block can be registered only while it has an owner.
        for group, block_ids in enumerate(load.block_ids):
            self._kv.pool.finish_pull(block_ids)
            for index, block_id in enumerate(block_ids, load.hit.end(group)):
                self._kv.pool.register(block_id, group, hashes[index])
            self._kv.pool.release(reversed(block_ids))
        self._kv.release_hit(load.hit)
        return load

    @property
    def has_jobs(self) -> bool:
        """Return whether ``take_jobs`` has a job."""
        return bool(self._jobs)

    def take_jobs(self) -> list[OffloadJob]:
        """Return the jobs that the ranks have not been told of, oldest first."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def frees_blocks_soon(self) -> bool:
        """Return whether copies will free blocks at their end, so no preemption is needed."""
        return any(
            self._kv.pool.num_owners(block_id) == num_copies
            for block_id, num_copies in Counter(self.held_ids()).items()
        )

    def held_ids(self) -> Iterator[int]:
        """Return the blocks that stores read."""
        return iter(()) if self._planner is None else self._planner.block_ids_in_flight("store")

    def add_to(self, stats: EngineStats) -> EngineStats:
        """Return ``stats`` with the tier's present contents."""
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
