"""Counts what an engine has done and what it has now, and proves who owns each block."""

from __future__ import annotations

import msgspec

from pdlaunch.engine.host_loads import HostLoads
from pdlaunch.engine.in_flight import StepsInFlight
from pdlaunch.engine.kv_requests import BlockLeases, BlockPulls
from pdlaunch.engine.kvcache.manager import KVCacheManager
from pdlaunch.engine.queues import RequestQueues
from pdlaunch.engine.request import Request
from pdlaunch.engine.step_builder import StepBuilder
from pdlaunch.protocol.costs import EngineReport
from pdlaunch.protocol.engine import EngineStats
from pdlaunch.protocol.transfer import PullFinished


class EngineFigures:
    """Reads the parts of a ``RequestLifecycle``, which alone changes them."""

    def __init__(
        self,
        kv: KVCacheManager,
        leases: BlockLeases,
        pulls: BlockPulls,
        host: HostLoads,
        queues: RequestQueues,
        in_flight: StepsInFlight,
        builder: StepBuilder,
    ) -> None:
        self._kv = kv
        self._leases = leases
        self._pulls = pulls
        self._host = host
        self._queues = queues
        self._in_flight = in_flight
        self._builder = builder
        self.counts = EngineStats(num_blocks=kv.pool.num_blocks)
        """Totals since the start; ``stats`` adds what is there now."""

    def add_prompt(self, request: Request) -> None:
        """Count where the tokens of a prompt come from."""
        cached, counts = request.cached_tokens, self.counts
        counts.prompt_tokens += request.num_prompt_tokens
        counts.cached_prompt_tokens += sum(cached)
        counts.remote_hit_tokens += cached.remote
        counts.host_hit_tokens += cached.host
        counts.device_hit_tokens += cached.device

    def add_pull(self, event: PullFinished) -> None:
        """Count a pull that has ended and had blocks to bring."""
        counts = self.counts
        if event.ok:
            counts.transfers += 1
            counts.transfer_bytes += event.num_bytes
            counts.transfer_seconds += event.seconds
        else:
            counts.transfer_failures += 1
            counts.late_reads += event.late
        counts.verification_failures += event.verification_failed
        counts.pull_retries += event.num_retries

    def stats(self) -> EngineStats:
        """Return the totals since the start, and how many requests and blocks are where now."""
        pool = self._kv.pool
        return msgspec.structs.replace(
            self._host.add_to(self.counts),
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting),
            num_waiting_for_kv=self._queues.num_waiting_for_kv,
            num_leased_requests=len(self._leases),
            num_free_blocks=pool.num_free_blocks,
            num_leased_blocks=len({*self._leases.all_ids()}),
            num_quarantined_blocks=pool.num_quarantined_blocks,
        )

    def report(self) -> EngineReport:
        """Return what there is to do now, which routers weigh their routes by."""
        queues, pool = self._queues, self._kv.pool
        streams = [request for request in queues.running if request.num_to_schedule <= 1]
        waiting_tokens = sum(
            request.num_to_schedule for request in queues.running if request.num_to_schedule > 1
        ) + sum(
            request.num_remaining
            for request in queues.waiting
            if request.num_remaining > 1 and not request.wants_pull
        )
        return EngineReport(
            waiting_tokens,
            len(streams),
            sum(request.num_computed for request in streams),
            pool.num_free_blocks // self._kv.num_groups * self._kv.block_size,
        )

    def check_integrity(self) -> None:
        """Prove that each request is in its place and each block has the owner that its request,
        lease, pull or load says. Raises AssertionError.
        """
        # Requests that have ended own row and blocks as long as a step in flight computes them.
        requests = {*self._queues.by_id.values(), *self._in_flight.ended()}
        owned = [block_id for request in requests for block_id in request.tables.all_ids()]
        self._kv.pool.check_integrity(
            owned=[
                *owned,
                *self._leases.all_ids(),
                *self._pulls.shared_ids(),
                *self._host.shared_ids(),
                *self._host.held_ids(),
            ],
            pulling=[*self._pulls.pulling_ids(), *self._host.loading_ids()],
            quarantined=self._pulls.quarantined_ids(),
        )
        self._host.check_integrity()
        self._queues.check_integrity()
        self._in_flight.check_integrity(requests)
        for request in requests:
            assert request.num_scheduled <= request.tables.end * self._kv.block_size
            assert request.row is None or self._builder.request_at(request.row) is request
