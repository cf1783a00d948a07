"""What an engine computes next: continuous batching under a token budget, over a paged KV cache.

``schedule -> run -> postprocess``. A step holds first the next token of every request that decodes, then chunks of prompts, in
order of arrival. When blocks run out, the latest arrival gives its own back and computes its tokens again later. Requests of a
decode engine wait without row and budget while their prompt's blocks are pulled, those of any engine while blocks come from host
memory. A prefix is looked for on the device, then on the host, then at the prefill engine; what is left is computed.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from operator import attrgetter

import msgspec

from pdlaunch.config.models import KVTransferSettings
from pdlaunch.engine.host_loads import HostLoads
from pdlaunch.engine.intake import Intake
from pdlaunch.engine.kv_requests import LeaseBook, PullBook
from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.request_blocks import RequestBlocks
from pdlaunch.engine.step import StepOutput, StepPlan
from pdlaunch.engine.step_builder import StepBuilder
from pdlaunch.kvcache.groups import KVCacheGroup
from pdlaunch.kvcache.manager import KVCacheManager
from pdlaunch.offload.jobs import JobFinished
from pdlaunch.offload.planner import OffloadPlanner
from pdlaunch.protocol.engine import AddRequest, EngineStats, FinishReason, RequestFinished, TokenOutput, Tokens
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.transfer import (
    EndLease,
    LeaseEnded,
    PullDrained,
    PullFinished,
    SetLeaseReaders,
    TransferCommand,
    TransferEvent,
)

logger = logging.getLogger(__name__)

_by_arrival = attrgetter("arrival")


class _Step:
    """The step that is being put together."""

    __slots__ = ("budget", "preempted", "scheduled")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that may still be added."""
        self.scheduled: dict[Request, int] = {}
        self.preempted = False

    def add(self, request: Request, num_tokens: int) -> None:
        self.scheduled[request] = num_tokens
        self.budget -= num_tokens

    def remove(self, request: Request) -> None:
        self.budget += self.scheduled.pop(request, 0)


class Scheduler:
    """Owns the requests and the KV blocks of an engine; lives in rank 0. Not safe for more than one thread.

    The caller alternates ``schedule`` and ``postprocess``, and calls the rest in between. ``local``: engine_id, host and port of
    the side channel, and tp_size of this engine, for the leases it hands out.
    """

    def __init__(
        self,
        *,
        groups: Sequence[KVCacheGroup],
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        model_digest: str,
        kv_transfer: KVTransferSettings,
        local: tuple[str, str, int, int],
        offload: OffloadPlanner | None = None,
    ) -> None:
        assert offload is None or enable_prefix_caching
        self._kv = KVCacheManager(groups, num_blocks, block_size)
        self._blocks = RequestBlocks(self._kv, block_size, caches=enable_prefix_caching)
        self._intake = Intake(self._kv, block_size=block_size, max_model_len=max_model_len, model_digest=model_digest)
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._settings = kv_transfer
        self._leases = LeaseBook(self._kv, kv_transfer, local)
        self._pulls = PullBook(self._kv, kv_transfer)
        self._host = HostLoads(self._kv, offload)
        self._builder = StepBuilder(max_num_seqs, tp_size=local[3])
        self._requests: dict[str, Request] = {}
        # Both in order of arrival. Waiting are those in phase WAITING and READY.
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._commands: list[TransferCommand] = []
        self._outputs: list[Tokens | RequestFinished] = []
        self._totals = EngineStats(num_blocks=num_blocks)
        self._may_progress = False
        self._stalls = False
        """Nothing could be computed before copies to host memory let go of their blocks."""

    # Requests come and go

    def add(self, message: AddRequest) -> None:
        """Take a request; what can never be served ends at once. A second request under a living id is dropped."""
        if message.request_id in self._requests:
            logger.error("request %s is here already; the second one is dropped", message.request_id)
            return
        request = self._intake.new_request(message)
        self._requests[message.request_id] = request
        self._enqueue(request)
        if error := self._intake.refusal(request):
            self._finish(request, "error", error=error)
        elif message.do_remote_decode and message.request_id in self._leases:
            self._finish(request, "error", error=f"an earlier request {message.request_id} still has a lease; use another id")
        elif message.output:
            self._finish_if_complete(request, message.output[-1].token_id)

    def abort(self, request_id: str) -> None:
        """End a request, or the lease of a finished one. Unknown ids are ignored."""
        if request_id in self._requests:
            self._finish(self._requests[request_id], "abort")
        elif request_id in self._leases:
            self._commands.append(EndLease(request_id=request_id))

    def set_readers(self, request_id: str, num_readers: int) -> None:
        """Fewer choices than announced go on: the lease of a finished request ends sooner. Unknown ids are ignored."""
        if request_id in self._leases:
            self._commands.append(SetLeaseReaders(request_id=request_id, num_readers=num_readers))

    def abort_all(self) -> None:
        """The server has restarted: end every request. Leases stay: their readers know of them already."""
        for request in list(self._requests.values()):
            self._finish(request, "abort")

    def on_transfer_event(self, event: TransferEvent) -> None:
        """Take what the ranks' connectors report; exactly one LeaseEnded, PullFinished, PullDrained an id, over all TP ranks."""
        self._may_progress = True
        match event:
            case LeaseEnded():
                self._totals.leases_expired += event.reason == "expired"
                self._leases.ended(event.request_id)
            case PullFinished():
                self._on_pull_finished(event)
            case PullDrained():
                self._pulls.drained(event.pull_id)

    def on_job_finished(self, report: JobFinished) -> None:
        """Take what all TP ranks together report of a job in ``StepPlan.jobs``; exactly one report a job."""
        self._may_progress = True
        load = self._host.finish(report)
        if load is None or load.request is None:
            return
        request = load.request
        self._enqueue(request)
        if not report.ok:
            logger.warning("load of request %s from host memory failed: %s", request.request_id, report.error)
            return
        request.num_host_tokens = (load.hit.end - load.hit.device.end(0)) * self._block_size
        num_loaded = load.hit.end * self._block_size
        if request.wants_pull:
            # The pull of what is left finds these blocks in the prefix cache.
            request.num_computed = num_loaded
            self._blocks.register(request)
            self._give_back(request)
        else:
            request.phase = Phase.READY
            self._begin(request, num_loaded)

    # A step

    def schedule(self) -> StepPlan:
        """Choose what the next step computes, and hand over the commands for the connectors."""
        self._may_progress = False
        step = _Step(self._max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        self._stalls = bool(self._running) and not step.scheduled
        commands, self._commands = self._commands, []
        return self._builder.build(step.scheduled, commands, self._host.take_jobs())

    def postprocess(self, plan: StepPlan, output: StepOutput) -> None:
        """Account for a step that has run; ``output`` is that of rank 0."""
        tokens = iter(output.tokens)
        for item in plan.scheduled:
            token = next(tokens) if item.sample else None
            request = self._builder.request_at(item.row)
            if request is None:
                continue
            request.num_computed += item.num_tokens
            self._host.store(request, self._blocks.register(request))
            if token is not None:
                self._take_token(request, token)

    def take_outputs(self) -> list[Tokens | RequestFinished]:
        """What the server has to be told since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def reset_prefix_cache(self) -> None:
        """The KV cache has lost its content; no request, lease or transfer holds a block."""
        assert not self._requests
        self._kv.pool.forget_cached()

    def has_work(self) -> bool:
        """Whether ``schedule`` has something to do now; False while all wait for a lease, a pull or a copy to end."""
        computes = self._running and not self._stalls
        return bool(computes or self._commands or self._host.has_jobs or self._may_progress or self._builder.has_freed_rows)

    def stats(self) -> EngineStats:
        """Totals since the start, and what is there now."""
        pool = self._kv.pool
        return msgspec.structs.replace(
            self._host.add_to(self._totals),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_for_kv=self._num_waiting_for_kv(),
            num_leased_requests=len(self._leases),
            num_free_blocks=pool.num_free_blocks,
            num_leased_blocks=pool.num_leased_blocks,
            num_quarantined_blocks=pool.num_quarantined_blocks,
        )

    def check_integrity(self) -> None:
        """Prove that every block has the owner that the requests, leases and pulls say, and each request its place."""
        owned = [block_id for request in self._requests.values() for block_id in request.tables.all_ids()]
        self._kv.pool.check_integrity(
            owned=[*owned, *self._pulls.shared_ids(), *self._host.shared_ids()],
            leased=self._leases.all_ids(),
            held=self._host.held_ids(),
            pulling=[*self._pulls.pulling_ids(), *self._host.loading_ids()],
            quarantined=self._pulls.quarantined_ids(),
        )
        self._host.check_integrity()
        assert self._running == sorted(self._running, key=_by_arrival)
        assert self._waiting == sorted(self._waiting, key=_by_arrival)
        places = {
            Phase.WAITING: self._waiting,
            Phase.READY: self._waiting,
            Phase.RUNNING: self._running,
        }
        for request in self._requests.values():
            assert request in places.get(request.phase, [request])
            assert (request.row is not None) == (request.phase is Phase.RUNNING)
            assert request.tables.end == 0 or request.phase in (Phase.READY, Phase.RUNNING)
            assert request.num_computed <= request.tables.end * self._block_size
            assert request.row is None or self._builder.request_at(request.row) is request
        assert len(self._requests) == len(self._waiting) + len(self._running) + self._num_waiting_for_kv()

    def _num_waiting_for_kv(self) -> int:
        return sum(request.phase in (Phase.PULLING, Phase.LOADING) for request in self._requests.values())

    # Choosing

    def _schedule_running(self, step: _Step) -> None:
        prefilling = []
        for request in self._running.copy():
            if request.num_remaining > 1:
                prefilling.append(request)
            else:
                self._schedule_chunk(request, step)
        for request in prefilling:
            self._schedule_chunk(request, step)

    def _schedule_chunk(self, request: Request, step: _Step) -> None:
        """Add the next tokens of a running request, as many as budget and blocks allow; for one of them others make room."""
        if request.phase is not Phase.RUNNING or step.budget == 0:
            return
        self._kv.release_left(request.tables, request.num_computed)
        num_tokens = min(request.num_remaining, step.budget)
        if request.num_computed + num_tokens > request.tables.end * self._block_size:
            while not (room := self._blocks.room(request)):
                if self._host.frees_blocks_soon() or self._preempt_latest(step) is request:
                    return
            num_tokens = min(num_tokens, room)
            self._kv.extend(request.tables, request.num_computed + num_tokens)
        step.add(request, num_tokens)

    def _schedule_waiting(self, step: _Step) -> None:
        """Start requests in order of arrival. One that lacks blocks holds back those later ones that would take any."""
        lacks_blocks = False
        for request in self._waiting.copy():
            if lacks_blocks and request.phase is Phase.WAITING:
                continue
            if request.wants_pull:
                lacks_blocks |= not self._start_pull(request)
            if not request.wants_pull and step.budget and self._builder.has_free_row:
                lacks_blocks |= not self._admit(request, step)
        if lacks_blocks and not self._running:
            self._break_standstill(step)

    def _admit(self, request: Request, step: _Step) -> bool:
        """Seat a request and schedule its first chunk. False: it lacks blocks. True also when it had better wait a step."""
        if request.phase is Phase.WAITING:
            hit = self._blocks.find_prefix(request)
            if self._blocks.is_computed_elsewhere(request, hit, self._running):
                return True
            if not self._blocks.has_room_for(request, hit, len(self._running)):
                return False
            if self._start_load(request):
                return True
            self._kv.share(request.tables, hit)
            self._begin(request, request.tables.end * self._block_size)
        room = self._blocks.room(request)
        if not room:
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=_by_arrival)
        request.phase = Phase.RUNNING
        self._builder.seat(request)
        num_tokens = min(request.num_remaining, step.budget, room)
        self._kv.extend(request.tables, request.num_computed + num_tokens)
        step.add(request, num_tokens)
        return True

    def _start_load(self, request: Request) -> bool:
        """Have blocks brought from host memory that the device lacks. False: it has none of them."""
        hit = self._host.find(request, self._blocks.max_loadable(request))
        if hit is None or not self._blocks.has_room_for(request, hit.device, len(self._running)):
            return False
        if not self._host.is_waited_for(hit):
            self._host.start(request, hit)
            self._waiting.remove(request)
            request.phase = Phase.LOADING
        return True

    def _start_pull(self, request: Request) -> bool:
        """Have the prompt's blocks brought here; those that are cached need not be. False: it lacks blocks."""
        if self._blocks.gains_from_sibling(request) and self._pulls.is_waited_for(request):
            # Another choice of the same prompt: its full blocks will be in the cache soon.
            return True
        hit = self._blocks.find_for_pull(request)
        if not self._blocks.has_room_for(request, hit, len(self._running)):
            return False
        if self._start_load(request):
            return True
        command = self._pulls.start(request, hit)
        if command is None:
            self._commands.append(self._pulls.tell_holder(request))
            self._kv.share(request.tables, hit)
            self._become_ready(request)
            return True
        self._commands.append(command)
        self._waiting.remove(request)
        request.phase = Phase.PULLING
        return True

    def _preempt_latest(self, step: _Step) -> Request:
        """Take all blocks from the latest arrival that has any and is not at work with a connector; it starts anew."""
        ready = [request for request in self._waiting if request.phase is Phase.READY]
        victim = max(ready[-1:] + self._running[-1:], key=_by_arrival)
        if victim.phase is Phase.RUNNING:
            self._running.remove(victim)
            self._builder.unseat(victim)
            insort(self._waiting, victim, key=_by_arrival)
        step.remove(victim)
        step.preempted = True
        self._host.store(victim, range(victim.num_registered_blocks))
        self._give_back(victim)
        victim.phase = Phase.WAITING
        victim.may_load = True
        self._totals.preemptions += 1
        self._may_progress = True
        return victim

    def _break_standstill(self, step: _Step) -> None:
        """Nothing runs and each of the READY ones lacks a block that another one holds: the latest gives way."""
        if sum(request.phase is Phase.READY for request in self._waiting) > 1:
            self._preempt_latest(step)

    # Life of a request

    def _enqueue(self, request: Request) -> None:
        request.phase = Phase.WAITING
        insort(self._waiting, request, key=_by_arrival)
        self._may_progress = True

    def _begin(self, request: Request, num_computed: int) -> None:
        """The request has its first ``num_computed`` tokens without having computed them here."""
        request.num_computed = num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self._count_prompt(request, request.num_cached_tokens)
        self._host.store(request, self._blocks.register(request))

    def _count_prompt(self, request: Request, num_cached: int) -> None:
        """Account for where the first ``num_cached`` tokens of a prompt came from."""
        num_remote = min(request.num_remote_tokens, num_cached)
        num_host = min(request.num_host_tokens, num_cached - num_remote)
        totals = self._totals
        totals.prompt_tokens += request.num_prompt_tokens
        totals.cached_prompt_tokens += num_cached
        totals.remote_hit_tokens += num_remote
        totals.host_hit_tokens += num_host
        totals.device_hit_tokens += num_cached - num_remote - num_host

    def _give_back(self, request: Request) -> None:
        """The request's blocks are the cache's; it begins anew."""
        self._kv.free(request.tables)
        request.num_computed = request.num_registered_blocks = 0

    def _become_ready(self, request: Request) -> None:
        request.phase = Phase.READY
        request.wants_pull = False
        self._begin(request, request.num_pulled_tokens)

    def _on_pull_finished(self, event: PullFinished) -> None:
        pull = self._pulls.finish(event)
        if pull is None:
            return
        if pull.block_ids:
            self._count_transfer(event)
        request = pull.request
        if request is None:
            return
        self._enqueue(request)
        if event.ok:
            request.num_remote_tokens = max(0, request.num_pulled_tokens - pull.hit.end(0) * self._block_size)
            self._become_ready(request)
            return
        logger.warning("pull of request %s failed: %s", request.request_id, event.error)
        request.num_pull_attempts += 1
        if event.retryable and request.num_pull_attempts < self._settings.pull_attempts:
            self._totals.pull_retries += 1
            return
        request.wants_pull = False
        if self._settings.on_failure == "fail":
            self._finish(request, "error", error=f"the prompt's KV blocks could not be pulled: {event.error}")
        else:
            self._totals.recomputed_requests += 1

    def _count_transfer(self, event: PullFinished) -> None:
        totals = self._totals
        if event.ok:
            totals.transfers += 1
            totals.transfer_bytes += event.num_bytes
            totals.transfer_seconds += event.seconds
        else:
            totals.transfer_failures += 1
            totals.verification_failures += event.verification_failed
            totals.late_reads += event.late

    def _take_token(self, request: Request, token: TokenOutput) -> None:
        request.token_ids.append(token.token_id)
        self._totals.generation_tokens += 1
        if not self._finish_if_complete(request, token.token_id, token):
            self._builder.add_sampled(request)
            self._outputs.append(Tokens(request_id=request.request_id, tokens=[token]))

    def _finish_if_complete(self, request: Request, token_id: int, token: TokenOutput | None = None) -> bool:
        """End the request if its last token is the last one; ``token`` is given when the server does not know it yet."""
        reason = request.end_of(token_id)
        if reason is None:
            return False
        self._finish(
            request,
            reason,
            tokens=[] if token is None else [token],
            stop_token_id=token_id if reason == "stop" else None,
            remote_kv=None if token is None else self._grant_lease(request, token, reason),
        )
        return True

    def _grant_lease(self, request: Request, token: TokenOutput, reason: FinishReason) -> RemoteKV | None:
        """Other choices may go on although this one has stopped; the server ends a lease that nobody needs."""
        num_readers = request.message.num_readers
        if not request.message.do_remote_decode or num_readers < 1 or (reason == "stop" and num_readers == 1):
            return None
        command, remote = self._leases.grant(request, token, reason)
        self._commands.append(command)
        return remote

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        tokens: list[TokenOutput] | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
        remote_kv: RemoteKV | None = None,
    ) -> None:
        """Give back what the request holds and say its last word."""
        del self._requests[request.request_id]
        if request.phase is Phase.RUNNING:
            self._running.remove(request)
            self._builder.unseat(request)
        elif request.phase is Phase.PULLING:
            self._commands.append(self._pulls.cancel(request))
        elif request.phase is Phase.LOADING:
            self._host.cancel(request)
        else:
            del self._waiting[bisect_left(self._waiting, request.arrival, key=_by_arrival)]
        if request.wants_pull and request.phase is not Phase.PULLING:
            self._commands.append(self._pulls.tell_holder(request))
        self._kv.free(request.tables)
        request.phase = Phase.FINISHED
        self._may_progress = True
        self._outputs.append(
            RequestFinished(
                request_id=request.request_id,
                reason=reason,
                tokens=tokens or [],
                stop_token_id=stop_token_id,
                error=error,
                num_cached_tokens=request.num_cached_tokens or 0,
                remote_kv=remote_kv,
            )
        )
