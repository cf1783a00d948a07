"""Tracks the KV blocks of leases, pulls and host copies, and queues the commands that start them.

    lease   running ─ grant ─▶ leased ─ LeaseEnded ─▶ free
    pull    start ─▶ in flight ─┬─ ok ──────────────────────────▶ the request's
                                ├─ failed ──────────────────────▶ free
                                └─ failed, READ may still write ▶ quarantined ─ PullDrained ─▶ free
    load    start ─▶ in flight ─┬─ ok ──────────────────────────▶ the request's
    (from host memory)          └─ failed, or request ended ────▶ free
    store   full blocks ─▶ owned also by the copy ─▶ released

The ranks' transfer threads watch all deadlines. Here, a lease, pull or copy ends only when its
event arrives.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.kvcache.manager import KVCacheManager, PrefixHit
from pdlaunch.engine.offload.planner import HostHit, JobFinished, OffloadJob, OffloadPlanner
from pdlaunch.engine.request import Phase, Request
from pdlaunch.protocol import transfer
from pdlaunch.protocol.engine import FinishReason
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, lease_of
from pdlaunch.protocol.kv_params import RemoteKV


@dataclass(slots=True)
class Incoming:
    """Describes blocks to which a pull or a load may write."""

    # The request that waits for the blocks; None once it has ended, and for a pull of no blocks
    request: Request | None
    hit: PrefixHit  # cached blocks that ``request`` shares while it waits
    block_ids: list[list[int]]  # blocks to write to, by group; they follow those of ``hit``
    host_ids: frozenset[int] = frozenset()  # blocks of host memory that a load reads


@dataclass(eq=False)
class KVTransfers:
    """Owns the blocks of leases, pulls, loads and stores. ``planner``: None without a host tier."""

    kv: KVCacheManager
    spec: EngineSpec
    counts: dict[str, float]  # the engine's totals, updated here
    engine_id: EngineId
    port: int  # of the side channel
    planner: OffloadPlanner | None

    def __post_init__(self) -> None:
        # Commands and jobs that have not been sent to the ranks yet, oldest first.
        self.commands: list[transfer.TransferCommand] = []
        self.jobs: list[OffloadJob] = []
        self.leases: dict[LeaseId, list[list[int]]] = {}
        # Pulls in flight by pull_id, loads in flight by job_id.
        self._incoming: dict[PullId | int, Incoming] = {}
        self._quarantined: dict[PullId, list[list[int]]] = {}
        self._num_pulls = 0

    # Leases

    def grant(self, request: Request, reason: FinishReason) -> RemoteKV | None:
        """Lease the prompt's blocks of a request that ends now, if another engine may decode on.
        The lease serves all choices of the prompt, so it is granted even if this choice has
        stopped, unless there is no other. The server ends a lease that no choice needs.
        """
        message = request.message
        # The request ends with its first token, so no later step writes to the leased blocks.
        assert not (message.do_remote_decode and request.num_in_flight)
        is_over = message.num_readers < 1 or (reason == "stop" and message.num_readers == 1)
        if is_over or not message.do_remote_decode:
            return None
        lease_id, num_tokens = lease_of(request.request_id), request.num_prompt_tokens
        lease_s = self.spec.kv_transfer.lease_s
        leased = self.kv.lease(request.tables, num_tokens)
        self.leases[lease_id] = leased.block_ids
        self.commands.append(
            transfer.GrantLease(
                lease_id=lease_id,
                block_ids=leased.block_ids,
                first_block_index=leased.first,
                block_hashes=request.prompt_hashes(),
                num_tokens=num_tokens,
                num_readers=message.num_readers,
                lease_s=lease_s,
            )
        )
        num_blocks = sum(map(len, leased.block_ids))
        request.mark("lease granted", seconds=lease_s, blocks=num_blocks)
        return RemoteKV(
            engine_id=self.engine_id,
            lease_id=lease_id,
            host=self.spec.advertise_address,
            port=self.port,
            block_ids=leased.block_ids,
            num_tokens=num_tokens,
            tp_size=self.spec.tensor_parallel_size,
            lease_s=lease_s,
        )

    def end_lease(self, lease_id: LeaseId) -> None:
        # Full blocks stay in the prefix cache until they are reused. Reversed, so that a prompt's
        # tail is reused before its head: without the head, the cache cannot find the tail.
        for block_ids in self.leases.pop(lease_id, []):
            self.kv.pool.release(reversed(block_ids))

    # Pulls

    def is_pulled(self, request: Request) -> bool:
        """Return whether another choice of the same prompt pulls from the same lease."""
        return any(
            pull.request is not None
            and pull.request.wants_pull
            and pull.request.message.remote_kv == request.message.remote_kv
            for pull in self._incoming.values()
        )

    def start_pull(self, request: Request, hit: PrefixHit) -> bool:
        """Share ``hit`` and pull the prompt's other blocks. Returns False if none is missing."""
        end = self.kv.num_logical_blocks(request.num_prompt_tokens)
        starts = [hit.end(group) for group in range(self.kv.num_groups)]
        if min(starts) == end:
            return False
        pull = self._take(request, hit, [end - start for start in starts])
        request.incoming = self._begin_pull(request, pull, starts)
        return True

    def pull_nothing(self, request: Request) -> None:
        """Tell the prefill side that this reader no longer needs the lease."""
        num_groups = self.kv.num_groups
        # In each group, the pull begins where the prompt ends, so it brings no block.
        end = self.kv.num_logical_blocks(request.num_prompt_tokens)
        nothing = Incoming(None, PrefixHit([], []), [[]] * num_groups)
        self._begin_pull(request, nothing, [end] * num_groups)

    def _begin_pull(self, request: Request, pull: Incoming, starts: list[int]) -> PullId:
        pull_id = PullId(f"pull-{self._num_pulls}")
        self._num_pulls += 1
        self._incoming[pull_id] = pull
        remote = request.message.remote_kv
        assert remote is not None
        self.commands.append(
            transfer.StartPull(
                pull_id=pull_id,
                request_id=request.request_id,
                remote=remote,
                block_ids=pull.block_ids,
                first_block_index=starts,
                block_hashes=request.prompt_hashes(),
                num_tokens=request.num_prompt_tokens,
                records_spans=request.message.records_spans,
            )
        )
        return pull_id

    def finish_pull(self, event: transfer.PullFinished) -> Incoming | None:
        """Adopt, free or quarantine the pull's blocks. Return the pull; None for an unknown id."""
        pull = self._end(event.pull_id, ok=event.ok, writes=event.in_flight)
        if pull is not None and event.in_flight:
            self._quarantined[event.pull_id] = pull.block_ids
        return pull

    def drained(self, pull_id: PullId) -> None:
        for block_ids in self._quarantined.pop(pull_id, []):
            self.kv.pool.drain(block_ids)

    # Loads and stores

    def find_on_host(self, request: Request, max_blocks: int) -> HostHit | None:
        """Return the longest prefix that is partly in host memory; None if that adds nothing."""
        if self.planner is None or not request.may_load:
            return None
        return self.planner.find(request.hasher.block_hashes, max_blocks, self.kv.pool.find)

    def is_loaded(self, hit: HostHit) -> bool:
        """Return whether another request loads a part of ``hit``; that part is cached soon."""
        wanted = {host_id for host_ids in hit.host_ids for host_id in host_ids}
        return any(
            load.request is not None and not load.host_ids.isdisjoint(wanted)
            for load in self._incoming.values()
        )

    def start_load(self, request: Request, hit: HostHit) -> None:
        assert self.planner is not None
        load = self._take(request, hit.device, list(map(len, hit.host_ids)))
        job = self.planner.begin_load(hit, load.block_ids, request.hasher.block_hashes)
        load.host_ids = frozenset(job.host_ids)
        self._incoming[job.job_id] = load
        request.incoming = job.job_id
        self.jobs.append(job)

    def store(self, request: Request, blocks: range) -> None:
        """Copy full blocks to host memory, unless they are there already."""
        if self.planner is None or not blocks:
            return
        job = self.planner.begin_store(request.tables, request.hasher.block_hashes, blocks)
        if job is not None:
            self.kv.pool.share(job.block_ids)
            self.jobs.append(job)

    def finish_job(self, report: JobFinished) -> Incoming | None:
        """Release a store's blocks, or adopt or free a load's. Return the load, if it is one."""
        assert self.planner is not None
        job, counts = self.planner.finish(report), self.counts
        if job.direction == "store":
            counts["kv_offload_stored_bytes"] += report.num_bytes
            counts["kv_offload_store_failures"] += not report.ok
            # Reversed, so that a prompt's tail is reused before its head.
            self.kv.pool.release(reversed(job.block_ids))
            return None
        counts["kv_offload_loaded_bytes"] += report.num_bytes
        counts["kv_offload_load_failures"] += not report.ok
        counts["kv_offload_bad_blocks"] += len(report.failed_host_ids)
        return self._end(job.job_id, ok=report.ok)

    def frees_blocks_soon(self) -> bool:
        """Return whether a block is owned by stores alone, whose end will free it."""
        return any(
            self.kv.pool.num_owners(block_id) == num_copies
            for block_id, num_copies in Counter(self._stored_ids()).items()
        )

    # Both

    def cancel(self, request: Request) -> None:
        """Detach a request that has ended. The pull or load keeps its blocks until it has ended."""
        assert request.incoming is not None
        incoming = self._incoming[request.incoming]
        incoming.request = None
        self.kv.release_hit(incoming.hit)
        if request.phase is Phase.PULLING:
            self.commands.append(transfer.CancelPull(pull_id=PullId(str(request.incoming))))

    def _take(self, request: Request, hit: PrefixHit, counts: list[int]) -> Incoming:
        # Share before allocating, because an allocation may reuse cached blocks that nobody owns.
        self.kv.share_hit(hit)
        return Incoming(request, hit, list(map(self.kv.pool.allocate_for_pull, counts)))

    def _end(self, key: PullId | int, *, ok: bool, writes: bool = False) -> Incoming | None:
        """Give the blocks to the request, or free them; quarantine them if a READ ``writes``."""
        incoming = self._incoming.pop(key, None)
        if incoming is None:
            return None
        request, pool = incoming.request, self.kv.pool
        if request is not None:
            request.incoming = None
        if ok and request is not None:
            self.kv.adopt_pulled(request.tables, incoming.hit, incoming.block_ids)
            return incoming
        # The request has ended or the transfer has failed: keep none of the blocks.
        for block_ids in incoming.block_ids:
            (pool.quarantine if writes else pool.drop_pull)(block_ids)
        if request is not None:
            self.kv.release_hit(incoming.hit)
        return incoming

    # State

    def present(self) -> dict[str, Any]:
        """Return the current EngineStats fields of leases, quarantined blocks and the host tier."""
        found = {
            "num_leased_requests": len(self.leases),
            "num_leased_blocks": len({*_flat(self.leases.values())}),
            "num_quarantined_blocks": self.kv.pool.num_quarantined_blocks,
        }
        if self.planner is not None:
            tier = self.planner.tier
            found |= {
                "num_host_blocks": tier.num_blocks,
                "num_used_host_blocks": tier.num_used_blocks,
                "num_offload_jobs": self.planner.num_jobs,
            }
            self.counts["kv_offload_evicted_blocks"] = tier.num_evicted_blocks
        return found

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that these requests and this object own all used blocks. Raises AssertionError."""
        incoming = list(self._incoming.values())
        shared = [one.hit.block_ids for one in incoming if one.request is not None]
        self.kv.pool.check_integrity(
            owned=[
                *_flat(request.tables.block_ids for request in requests),
                *_flat([*self.leases.values(), *shared]),
                *self._stored_ids(),
            ],
            pulling=_flat([one.block_ids for one in incoming]),
            quarantined=_flat(self._quarantined.values()),
        )
        if self.planner is not None:
            self.planner.check_integrity()

    def _stored_ids(self) -> Iterator[int]:
        return iter(()) if self.planner is None else self.planner.block_ids_in_flight("store")


def _flat(owners: Iterable[list[list[int]]]) -> Iterator[int]:
    return (block_id for groups in owners for block_ids in groups for block_id in block_ids)
