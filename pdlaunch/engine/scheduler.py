"""What an engine computes next: continuous batching under a token budget, over a paged KV cache.

``schedule -> run -> postprocess``. A step holds first the next token of every request that decodes,
then chunks of prompts, in order of arrival. When blocks run out, the latest arrival gives its own
back and computes its tokens again later. Requests of a decode engine wait without row and budget
while their prompt's blocks are computed elsewhere and pulled, those of any engine while blocks come
from host memory. A prefix is looked for on the device, then on the host, then at the prefill
engine; what is left is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from pdlaunch.config.models import KVTransferSettings
from pdlaunch.engine.host_loads import HostLoads
from pdlaunch.engine.in_flight import StepsInFlight
from pdlaunch.engine.intake import Intake
from pdlaunch.engine.kv_requests import LeaseBook, PullBook
from pdlaunch.engine.queues import RequestQueues
from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.request_blocks import RequestBlocks
from pdlaunch.engine.step import StepOutput, StepPlan
from pdlaunch.engine.step_builder import StepBuilder, StepDraft
from pdlaunch.engine.totals import Totals
from pdlaunch.kvcache.groups import KVCacheGroup
from pdlaunch.kvcache.manager import KVCacheManager
from pdlaunch.offload.jobs import JobFinished
from pdlaunch.offload.planner import OffloadPlanner
from pdlaunch.protocol.engine import (
    AddRequest,
    EngineStats,
    FinishReason,
    FirstTokens,
    RequestFinished,
    TokenOutput,
    Tokens,
    output_of,
)
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

NAN_LOGITS = (
    "the model's logits for this request are not numbers (NaN), so that no token can be drawn; "
    "look for overflow in its dtype, "
    "or for damaged weights"
)


class Scheduler:
    """Owns the requests and the KV blocks of an engine; lives in rank 0. Not safe for more than one
    thread.

    The caller alternates ``schedule`` and ``postprocess``, and calls the rest in between; with
    ``schedule_ahead`` it may have a second plan before the first one's step has ended
    (``in_flight.py``). ``local``: engine_id, host and port of the side channel, and tp_size of this
    engine, for the leases it hands out.
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
        self._intake = Intake(
            self._kv, block_size=block_size, max_model_len=max_model_len, model_digest=model_digest
        )
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._settings = kv_transfer
        self._leases = LeaseBook(self._kv, block_size, kv_transfer, local)
        self._pulls = PullBook(self._kv, kv_transfer)
        self._host = HostLoads(self._kv, offload)
        self._builder = StepBuilder(max_num_seqs, tp_size=local[3])
        self._queues = RequestQueues()
        self._in_flight = StepsInFlight()
        self._commands: list[TransferCommand] = []
        self._outputs: list[Tokens | FirstTokens | RequestFinished] = []
        self._begun: list[Request] = []
        """The prefix cache and the host have not heard of the blocks with which they began."""
        self._totals = Totals(num_blocks)
        self._may_progress = False
        self._stalls = False
        """Nothing could be computed before copies to host memory let go of their blocks."""

    # Requests come and go

    def add(self, message: AddRequest) -> None:
        """Take a request; what can never be served ends at once. A second request under a living id
        is dropped.
        """
        if message.request_id in self._queues.by_id:
            logger.error(
                "request %s is here already; the second one is dropped", message.request_id
            )
            return
        request = self._intake.new_request(message)
        self._queues.add(request)
        self._may_progress = True
        if error := self._intake.refusal(request):
            self._finish(request, "error", error=error)
        elif message.do_remote_decode and message.request_id in self._leases:
            error = f"an earlier request {message.request_id} still has a lease; use another id"
            self._finish(
                request, "error", error=error, error_param="kv_transfer_params.pdlaunch.lease_id"
            )
        elif message.output:
            self._finish_if_complete(request, message.output[-1].token_id)

    def abort(self, request_id: str) -> None:
        """End a request, or the lease of a finished one. Unknown ids are ignored."""
        if request_id in self._queues.by_id:
            self._finish(self._queues.by_id[request_id], "abort")
        elif request_id in self._leases:
            self._commands.append(EndLease(request_id=request_id))

    def set_readers(self, request_id: str, num_readers: int) -> None:
        """Fewer choices than announced go on: the lease of a finished request ends sooner. Unknown
        ids are ignored.
        """
        if request_id in self._leases:
            self._commands.append(SetLeaseReaders(request_id=request_id, num_readers=num_readers))

    def abort_all(self) -> None:
        """The server has restarted: end every request. Leases stay: their readers know of them
        already.
        """
        for request in list(self._queues.by_id.values()):
            self._finish(request, "abort")

    def on_transfer_event(self, event: TransferEvent) -> None:
        """Take what the ranks' connectors report; of a kind exactly one an id, over all TP
        ranks.
        """
        self._may_progress = True
        match event:
            case LeaseEnded():
                self._totals.counts.leases_expired += event.reason == "expired"
                self._leases.ended(event.request_id)
            case PullFinished():
                self._on_pull_finished(event)
            case PullDrained():
                self._pulls.drained(event.pull_id)

    def on_job_finished(self, report: JobFinished) -> None:
        """Take what all TP ranks together report of a job in ``StepPlan.jobs``; exactly one report
        a job.
        """
        self._may_progress = True
        load = self._host.finish(report)
        if load is None or load.request is None:
            return
        request = load.request
        self._queues.wait(
            request, Phase.READY if report.ok and not request.wants_pull else Phase.WAITING
        )
        if not report.ok:
            logger.warning(
                "load of request %s from host memory failed: %s", request.request_id, report.error
            )
            return
        request.num_host_tokens = load.hit.num_blocks_to_load(0) * self._block_size
        if not request.wants_pull:
            self._begin(request, load.hit.ends[0] * self._block_size)

    # A step

    def schedule(self) -> StepPlan:
        """Choose what the next step computes, and hand over the commands for the connectors. No
        step is in flight.
        """
        assert not self._in_flight
        return self._schedule()

    def schedule_ahead(self) -> StepPlan | None:
        """Choose what follows the one step in flight, whatever tokens that one draws. None: it has
        to be collected first.

        So it is when prompts are to be computed: beside such a step planning costs nothing, and
        later arrivals can still join it. And when a request would have to give blocks up for
        others, draws from its output, or is a suspect.
        """
        assert len(self._in_flight) == 1
        arrived = self._queues.waiting if self._builder.has_free_row else []
        if any(
            request.is_suspect for queue in (self._queues.running, arrived) for request in queue
        ):
            # What dies with two steps in flight, died of either.
            return None
        going_on = [request for request in self._queues.running if not request.ends_in_flight]
        if any(
            request.num_to_schedule > 1 or request.draws_from_its_output for request in going_on
        ):
            return None
        if any(request.num_remaining > 1 and not request.wants_pull for request in arrived):
            return None
        return self._schedule() if self._blocks.have_room_for_one_more(going_on) else None

    def hand_over(self) -> StepPlan:
        """What connectors and the host tier have to hear of before the server hears of
        ``take_outputs``; computes nothing.
        """
        commands, self._commands = self._commands, []
        return StepPlan(step_id=-1, commands=commands, jobs=self._host.take_jobs())

    def _schedule(self) -> StepPlan:
        self._may_progress = False
        step = StepDraft(self._max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        self._stalls = bool(self._queues.running) and not step.scheduled
        self._commands += [
            self._leases.announce(request)
            for request in step.scheduled
            if request.message.is_awaited
        ]
        commands, self._commands = self._commands, []
        plan = self._builder.build(step.scheduled, commands, self._host.take_jobs())
        self._in_flight.launch(plan, [*step.scheduled])
        return plan

    def register_begun(self) -> None:
        """Let others find the blocks with which requests have begun; to be called beside a step, as
        no step needs it.

        Whatever looks for blocks before that, or takes them back, does it first.
        """
        begun, self._begun = self._begun, []
        for request in begun:
            self._register(request)

    def postprocess(self, plan: StepPlan, output: StepOutput) -> None:
        """Account for a step that has run, the oldest in flight; ``output`` is that of rank 0."""
        tokens = iter(output.tokens)
        for item, request in self._in_flight.collect(plan):
            drawn = next(tokens) if item.sample else None
            if request.phase is Phase.FINISHED:
                if self._in_flight.is_free(request):
                    self._let_go(request)
                continue
            request.num_computed += item.num_tokens
            self._register(request)
            if drawn is not None:
                self._take_token(request, drawn)
            elif item.sample:
                logger.error("request %s ends: its logits are NaN", request.request_id)
                self._finish(request, "error", error=NAN_LOGITS)

    def marks_in_flight(self) -> list[int]:
        """Return what ``StepRecord`` is to hold while the steps in flight run."""
        return self._in_flight.marks()

    def take_outputs(self) -> list[Tokens | FirstTokens | RequestFinished]:
        """What the server has to be told since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def reset_prefix_cache(self) -> None:
        """The KV cache has lost its content; no request, lease or transfer holds a block."""
        assert not self._queues.by_id
        self._kv.pool.forget_cached()

    def has_work(self) -> bool:
        """Whether ``schedule`` has something to do now; False while all wait for a lease, a pull or
        a copy to end.
        """
        computes = self._queues.running and not self._stalls
        told = self._commands or self._host.has_jobs or self._builder.has_freed_rows
        return bool(computes or told or self._may_progress or self._in_flight)

    def stats(self) -> EngineStats:
        """Totals since the start, and what is there now."""
        pool = self._kv.pool
        return msgspec.structs.replace(
            self._host.add_to(self._totals.counts),
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting),
            num_waiting_for_kv=self._queues.num_waiting_for_kv,
            num_leased_requests=len(self._leases),
            num_free_blocks=pool.num_free_blocks,
            num_leased_blocks=pool.num_leased_blocks,
            num_quarantined_blocks=pool.num_quarantined_blocks,
        )

    def check_integrity(self) -> None:
        """Prove that every block has the owner that the requests, leases and pulls say, and each
        request its place.
        """
        requests = {*self._queues.by_id.values(), *self._in_flight.ended()}
        owned = [block_id for request in requests for block_id in request.tables.all_ids()]
        self._kv.pool.check_integrity(
            owned=[*owned, *self._pulls.shared_ids(), *self._host.shared_ids()],
            leased=self._leases.all_ids(),
            held=self._host.held_ids(),
            pulling=[*self._pulls.pulling_ids(), *self._host.loading_ids()],
            quarantined=self._pulls.quarantined_ids(),
        )
        self._host.check_integrity()
        self._queues.check_integrity()
        self._in_flight.check_integrity(requests)
        for request in requests:
            assert request.num_scheduled <= request.tables.end * self._block_size
            assert request.row is None or self._builder.request_at(request.row) is request

    # Choosing

    def _schedule_running(self, step: StepDraft) -> None:
        prefilling = []
        for request in self._queues.running.copy():
            if request.ends_in_flight:
                continue
            if request.num_to_schedule > 1:
                prefilling.append(request)
            else:
                self._schedule_chunk(request, step)
        for request in prefilling:
            self._schedule_chunk(request, step)

    def _schedule_chunk(self, request: Request, step: StepDraft) -> None:
        """Add the next tokens of a running request, as many as budget and blocks allow; for one of
        them others make room.
        """
        if request.phase is not Phase.RUNNING or step.budget == 0:
            return
        self._kv.release_left(request.tables, request.num_computed)
        start = request.num_scheduled
        num_tokens = min(request.num_to_schedule, step.budget)
        if start + num_tokens > request.tables.end * self._block_size:
            while not (room := self._blocks.room(request)):
                if self._host.frees_blocks_soon() or self._preempt_latest(step) is request:
                    return
            num_tokens = min(num_tokens, room)
            self._kv.extend(request.tables, start + num_tokens)
        step.add(request, num_tokens)

    def _schedule_waiting(self, step: StepDraft) -> None:
        """Start requests in order of arrival. One that lacks blocks holds back those later ones
        that would take any.
        """
        lacks_blocks = False
        for request in self._queues.waiting.copy():
            if lacks_blocks and request.phase is Phase.WAITING:
                continue
            if request.phase is Phase.WAITING:
                self.register_begun()
            if request.wants_pull:
                lacks_blocks |= not self._start_pull(request)
            if (
                not request.wants_pull
                and step.budget
                and self._builder.has_free_row
                and not self._has_to_be_apart(request)
            ):
                lacks_blocks |= not self._admit(request, step)
        if lacks_blocks and not self._queues.running and not self._in_flight:
            self._break_standstill(step)

    def _has_to_be_apart(self, request: Request) -> bool:
        """Two suspects are never in one step: who survives a step is none any more."""
        return request.is_suspect and any(other.is_suspect for other in self._queues.running)

    def _admit(self, request: Request, step: StepDraft) -> bool:
        """Seat a request and schedule its first chunk. False: it lacks blocks. True also when it
        had better wait a step.
        """
        if request.phase is Phase.WAITING:
            hit = self._blocks.find_prefix(request)
            if self._blocks.is_computed_elsewhere(request, hit, self._queues.running):
                return True
            if not self._blocks.has_room_for(request, hit, len(self._queues.running)):
                return False
            if self._start_load(request):
                return True
            self._kv.share(request.tables, hit)
            self._begin(request, request.tables.end * self._block_size)
        room = self._blocks.room(request)
        if not room:
            return False
        self._queues.run(request)
        self._builder.seat(request)
        num_tokens = min(request.num_remaining, step.budget, room)
        self._kv.extend(request.tables, request.num_computed + num_tokens)
        step.add(request, num_tokens)
        return True

    def _start_load(self, request: Request) -> bool:
        """Have blocks brought from host memory that the device lacks. False: it has none of
        them.
        """
        hit = self._host.find(request, self._blocks.max_loadable(request))
        if hit is None or not self._blocks.has_room_for(
            request, hit.device, len(self._queues.running)
        ):
            return False
        if not self._host.is_waited_for(hit):
            self._host.start(request, hit)
            self._queues.await_kv(request, Phase.LOADING)
        return True

    def _start_pull(self, request: Request) -> bool:
        """Have the prompt's blocks brought here; those that are cached need not be. False: it lacks
        blocks.
        """
        if self._blocks.gains_from_sibling(request) and self._pulls.is_waited_for(request):
            # Another choice of the same prompt: its full blocks will be in the cache soon.
            return True
        hit = self._blocks.find_for_pull(request)
        if not self._blocks.has_room_for(request, hit, len(self._queues.running)):
            return False
        if self._start_load(request):
            return True
        if request.message.awaits_lease and not self._pulls.may_await(request, hit):
            return True
        command = self._pulls.start(request, hit)
        if command is None:
            self._commands.append(self._pulls.tell_holder(request))
            self._kv.share(request.tables, hit)
            request.phase = Phase.READY
            self._take_pulled(request)
            return True
        self._commands.append(command)
        self._queues.await_kv(request, Phase.PULLING)
        return True

    def _preempt_latest(self, step: StepDraft) -> Request:
        """Take all blocks from the latest arrival that has any and is not at work with a connector;
        it starts anew.
        """
        assert not self._in_flight
        self.register_begun()
        victim = self._queues.latest_owner()
        if victim.phase is Phase.RUNNING:
            self._builder.unseat(victim)
        self._queues.preempt(victim)
        step.remove(victim)
        step.preempted = True
        self._withdraw(victim)
        self._host.store(victim, range(victim.num_registered_blocks))
        self._give_back(victim)
        victim.may_load = True
        self._totals.counts.preemptions += 1
        self._may_progress = True
        return victim

    def _break_standstill(self, step: StepDraft) -> None:
        """Nothing runs and each of the READY ones lacks a block that another one holds: the latest
        gives way.
        """
        if len(self._queues.ready()) > 1:
            self._preempt_latest(step)

    # Life of a request

    def _begin(self, request: Request, num_computed: int) -> None:
        """The request has its first ``num_computed`` tokens without having computed them here."""
        request.num_computed = num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self._totals.add_prompt(request, request.num_cached_tokens)
        self._begun.append(request)

    def _register(self, request: Request) -> None:
        """Full blocks are for others to find, here and in host memory."""
        self._host.store(request, self._blocks.register(request))

    def _give_back(self, request: Request) -> None:
        """The request's blocks are the cache's; it begins anew."""
        self._kv.free(request.tables)
        request.num_computed = request.num_registered_blocks = 0

    def _take_pulled(self, request: Request) -> None:
        """All blocks of the prompt are the request's."""
        request.wants_pull = False
        self._begin(request, request.num_pulled_tokens)

    def _on_pull_finished(self, event: PullFinished) -> None:
        pull = self._pulls.finish(event)
        if pull is None:
            return
        if pull.tells_of_blocks(event):
            self._totals.add_pull(event)
        request = pull.request
        if request is None:
            return
        self._queues.wait(request, Phase.READY if event.ok else Phase.WAITING)
        request.wants_pull = False
        if event.ok:
            request.num_remote_tokens = max(
                0, request.num_pulled_tokens - pull.hit.end(0) * self._block_size
            )
            self._take_pulled(request)
        goes_on = not pull.awaits or self._take_first_token(request, event)
        if goes_on and not event.ok:
            self._do_without(request, event.error)

    def _take_first_token(self, request: Request, event: PullFinished) -> bool:
        """The lease that was awaited has brought it. False: the request has ended, with this token
        or for lack of it.
        """
        if not event.first_tokens:
            error = f"the lease on the prompt's KV blocks did not come: {event.error}"
            self._finish(request, "error", error=error, error_param="kv_transfer_params")
            return False
        token = output_of(event.first_tokens[0])
        self._outputs.append(FirstTokens(request_id=request.request_id, tokens=[token]))
        request.token_ids.append(token.token_id)
        return not self._finish_if_complete(request, token.token_id)

    def _do_without(self, request: Request, cause: str) -> None:
        """The prompt's blocks have not come."""
        logger.warning("pull of request %s failed: %s", request.request_id, cause)
        if self._settings.on_failure == "fail":
            self._finish(
                request, "error", error=f"the prompt's KV blocks could not be pulled: {cause}"
            )
        else:
            self._totals.counts.recomputed_requests += 1

    def _take_token(self, request: Request, token: TokenOutput) -> None:
        request.token_ids.append(token.token_id)
        if request.is_suspect:
            request.survive()
        self._totals.counts.generation_tokens += 1
        if not self._finish_if_complete(request, token.token_id, token):
            self._builder.add_sampled(request)
            self._outputs.append(Tokens(request_id=request.request_id, tokens=[token]))

    def _finish_if_complete(
        self, request: Request, token_id: int, token: TokenOutput | None = None
    ) -> bool:
        """End the request if its last token is the last one; ``token`` is given when the server
        does not know it yet.
        """
        reason = request.end_of(token_id)
        if reason is None:
            return False
        remote_kv = None if token is None else self._grant_lease(request, token, reason)
        if (
            remote_kv is not None
            and token is not None
            and reason == "length"
            and request.message.num_readers == 1
        ):
            # The token need not wait for the lease, as the answer does. With more choices the
            # answer needs them all.
            self._outputs.append(Tokens(request_id=request.request_id, tokens=[token]))
            token = None
        self._finish(
            request,
            reason,
            tokens=[] if token is None else [token],
            stop_token_id=token_id if reason == "stop" else None,
            remote_kv=remote_kv,
        )
        return True

    def _grant_lease(
        self, request: Request, token: TokenOutput, reason: FinishReason
    ) -> RemoteKV | None:
        """Other choices may go on although this one has stopped; the server ends a lease that
        nobody needs.
        """
        num_readers = request.message.num_readers
        assert not (request.message.do_remote_decode and request.num_in_flight)
        if (
            not request.message.do_remote_decode
            or num_readers < 1
            or (reason == "stop" and num_readers == 1)
        ):
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
        error_param: str | None = None,
        remote_kv: RemoteKV | None = None,
    ) -> None:
        """Give back what the request holds, unless a step in flight still needs it, and say its
        last word.
        """
        self._withdraw(request)
        if request.phase is Phase.PULLING:
            self._commands.append(self._pulls.cancel(request))
        elif request.phase is Phase.LOADING:
            self._host.cancel(request)
        # Whoever gives up before there is a lease leaves it to another reader.
        if (
            request.wants_pull
            and not request.message.awaits_lease
            and request.phase is not Phase.PULLING
        ):
            self._commands.append(self._pulls.tell_holder(request))
        if not self._in_flight.keep(request):
            self._let_go(request)
        self._queues.end(request)
        self._outputs.append(
            RequestFinished(
                request_id=request.request_id,
                reason=reason,
                tokens=tokens or [],
                stop_token_id=stop_token_id,
                error=error,
                error_param=error_param,
                num_cached_tokens=request.num_cached_tokens or 0,
                remote_kv=remote_kv,
            )
        )

    def _let_go(self, request: Request) -> None:
        """Row and blocks of a request that has ended are for others."""
        if request in self._begun:
            self.register_begun()
        if request.row is not None:
            self._builder.unseat(request)
        self._kv.free(request.tables)
        self._may_progress = True

    def _withdraw(self, request: Request) -> None:
        """Nobody is to read the request's blocks any more, if anybody was."""
        if request.is_announced:
            self._commands.append(self._leases.withdraw(request))
