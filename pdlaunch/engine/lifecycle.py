"""Leads the requests of an engine through their life, from arrival to the last word to the server.

Each move between phases (see ``Phase``) is one method of ``RequestLifecycle``, which moves the
row and the KV blocks along. ``scheduler.py`` chooses which requests move.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.figures import EngineFigures
from pdlaunch.engine.histograms import Histograms
from pdlaunch.engine.host_loads import HostLoads
from pdlaunch.engine.in_flight import StepsInFlight
from pdlaunch.engine.kv_requests import BlockLeases, BlockPulls
from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.manager import KVCacheManager, PrefixHit
from pdlaunch.engine.offload.jobs import JobFinished
from pdlaunch.engine.offload.planner import HostHit, OffloadPlanner
from pdlaunch.engine.outputs import RequestOutputs
from pdlaunch.engine.queues import RequestQueues
from pdlaunch.engine.registrations import Registrations
from pdlaunch.engine.request import Intake, Phase, Request
from pdlaunch.engine.request_blocks import RequestBlocks
from pdlaunch.engine.step_builder import StepBuilder
from pdlaunch.protocol.engine import WITHDRAWN, AddRequest, FinishReason, TokenOutput
from pdlaunch.protocol.ids import EngineId, LeaseId, RequestId, lease_of
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


class RequestLifecycle:
    """Owns the requests of an engine with their rows, KV blocks, leases, pulls and loads.

    Lives in rank 0. Not safe for more than one thread. ``local``: engine_id, host and port of the
    side channel, and tp_size of this engine, for the leases that it grants.
    """

    def __init__(
        self,
        *,
        groups: Sequence[KVCacheGroup],
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        model_digest: str,
        kv_transfer: KVTransferSettings,
        local: tuple[EngineId, str, int, int],
        offload: OffloadPlanner | None = None,
    ) -> None:
        assert offload is None or enable_prefix_caching
        self.kv = KVCacheManager(groups, num_blocks, block_size)
        self._intake = Intake(
            self.kv, block_size=block_size, max_model_len=max_model_len, model_digest=model_digest
        )
        self._block_size = block_size
        self._settings = kv_transfer
        self._leases = BlockLeases(self.kv, kv_transfer, local)
        self.blocks = RequestBlocks(self.kv, block_size, caches=enable_prefix_caching)
        self.pulls = BlockPulls(self.kv, kv_transfer)
        self.host = HostLoads(self.kv, offload)
        self.registrations = Registrations(
            self.kv, self.host, block_size, caches=enable_prefix_caching
        )
        self.outputs = RequestOutputs()
        self.builder = StepBuilder(max_num_seqs, tp_size=local[3])
        self.queues = RequestQueues()
        self.in_flight = StepsInFlight()
        self.commands: list[TransferCommand] = []
        """Commands for the connectors that no plan carries yet."""
        self.may_progress = False
        """Something has happened that may let a waiting request start; the scheduler clears it."""
        self.figures = EngineFigures(
            self.kv,
            self._leases,
            self.pulls,
            self.host,
            self.queues,
            self.in_flight,
            self.builder,
        )
        self.histograms = Histograms()

    # Messages of the server and of the connectors

    def add(self, message: AddRequest) -> None:
        """Take a request; one that can never be served ends at once.

        A second request under the id of a living one is dropped.
        """
        if message.request_id in self.queues.by_id:
            logger.error(
                "request %s is here already; the second one is dropped", message.request_id
            )
            return
        request = self._intake.new_request(message)
        self.histograms.arrived(request)
        self.queues.add(request)
        self.may_progress = True
        if error := self._intake.refusal(request):
            self._finish(request, "error", error=error)
        elif message.do_remote_decode and lease_of(message.request_id) in self._leases:
            error = f"an earlier request {message.request_id} still has a lease; use another id"
            self._finish(request, "error", error=error)
        elif message.output:
            self._finish_if_complete(request, message.output[-1].token_id)

    def abort(self, request_id: RequestId) -> None:
        """End a request, or the lease of a finished one. Unknown ids are ignored."""
        if request_id in self.queues.by_id:
            self._finish(self.queues.by_id[request_id], "abort")
        elif (lease_id := lease_of(request_id)) in self._leases:
            self.commands.append(EndLease(lease_id=lease_id))

    def withdraw(self, request_ids: Sequence[RequestId]) -> None:
        """End these requests if nothing was computed, pulled or loaded for any of them."""
        requests = [self.queues.by_id.get(request_id) for request_id in request_ids]
        if all(request is not None and not request.has_begun for request in requests):
            for request_id in request_ids:
                self._finish(self.queues.by_id[request_id], "abort", error=WITHDRAWN)

    def abort_all(self) -> None:
        """End every request, because the server has restarted. Leases stay for their readers."""
        for request in list(self.queues.by_id.values()):
            self._finish(request, "abort")

    def set_readers(self, lease_id: LeaseId, num_readers: int) -> None:
        """Lower the number of readers after which the lease of a finished request ends.

        Unknown ids are ignored.
        """
        if lease_id in self._leases:
            self.commands.append(SetLeaseReaders(lease_id=lease_id, num_readers=num_readers))

    def on_transfer_event(self, event: TransferEvent) -> None:
        """Take an event of a lease or a pull, already merged over all TP ranks."""
        self.may_progress = True
        match event:
            case LeaseEnded():
                self.figures.counts.leases_expired += event.reason == "expired"
                self._leases.ended(event.lease_id)
            case PullFinished():
                self._on_pull_finished(event)
            case PullDrained():
                self.pulls.drained(event.pull_id)

    def on_job_finished(self, report: JobFinished) -> None:
        """Take the end of a job of ``StepPlan.jobs``, already merged over all TP ranks."""
        self.may_progress = True
        load = self.host.finish(report)
        if load is None or load.request is None:
            return
        request = load.request
        num_tokens = load.hit.num_blocks_to_load(0) * self._block_size
        request.spans.loaded(ok=report.ok, num_tokens=num_tokens)
        # It waits again after a failed load, and before a pull: what was loaded is in the prefix
        # cache then, and the pull brings the rest.
        self.queues.wait(
            request, Phase.READY if report.ok and not request.wants_pull else Phase.WAITING
        )
        if not report.ok:
            logger.warning(
                "load of request %s from host memory failed: %s", request.request_id, report.error
            )
            return
        request.num_host_tokens = num_tokens
        if not request.wants_pull:
            self._skip_to(request, load.hit.ends[0] * self._block_size)

    # Decisions of the scheduler

    def share(self, request: Request, hit: PrefixHit) -> None:
        """Give a waiting request the cached blocks of ``hit``; it computes on from their end."""
        self.kv.share(request.tables, hit)
        self._skip_to(request, request.tables.end * self._block_size)

    def seat(self, request: Request) -> None:
        """Move a waiting or ready request into the batch."""
        self.histograms.seated(request)
        self.queues.run(request)
        self.builder.seat(request)

    def load(self, request: Request, hit: HostHit) -> None:
        """Let a waiting request wait for the blocks of ``hit`` from host memory."""
        self.host.start(request, hit)
        self.queues.await_kv(request, Phase.LOADING)

    def pull(self, request: Request, hit: PrefixHit) -> None:
        """Let a waiting request wait for the prompt's blocks that ``hit`` lacks; ready if none."""
        command = self.pulls.start(request, hit)
        if command is not None:
            self.commands.append(command)
            self.queues.await_kv(request, Phase.PULLING)
            return
        # All blocks are cached here, so that the lease is not needed.
        self.commands.append(self.pulls.tell_prefill_side(request))
        self.kv.share(request.tables, hit)
        # Not by a method of the queues: it stays in the one that holds both phases.
        request.phase = Phase.READY
        self._take_pulled(request)

    def preempt(self, request: Request) -> None:
        """Take all blocks from a running or ready request; it starts anew. No step is in flight."""
        assert not self.in_flight
        self.registrations.register_pending()
        if request.phase is Phase.RUNNING:
            self.builder.unseat(request)
        self.queues.preempt(request)
        # While the blocks are still its own: it will find them in host memory.
        self.host.store(request, range(request.num_registered_blocks))
        self.kv.free(request.tables)
        request.num_computed = request.num_registered_blocks = 0
        request.may_load = True
        self.figures.counts.preemptions += 1
        request.times.num_preemptions += 1
        self.may_progress = True

    # Results of steps

    def take_token(self, request: Request, token: TokenOutput | None) -> None:
        """Append the token that a step has drawn; None, for logits that are NaN, is an error."""
        if token is None:
            logger.error("request %s ends: its logits are NaN", request.request_id)
            self._finish(request, "error", error=NAN_LOGITS)
            return
        request.token_ids.append(token.token_id)
        if request.is_suspect:
            request.survive()
        self.figures.counts.generation_tokens += 1
        self.histograms.drew_token(request)
        if not self._finish_if_complete(request, token.token_id, token):
            self.builder.add_sampled(request)
            self.outputs.add_token(request, token)

    def let_go(self, request: Request) -> None:
        """Free row and blocks of a request that has ended and that no step computes any more."""
        if request in self.registrations:
            # Freed unregistered, the pulled or loaded blocks could not be found again.
            self.registrations.register_pending()
        if request.row is not None:
            self.builder.unseat(request)
        self.kv.free(request.tables)
        self.may_progress = True

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks, as their content is lost; nobody uses any block."""
        assert not self.queues.by_id
        self.kv.pool.forget_cached()

    # Moves

    def _skip_to(self, request: Request, num_computed: int) -> None:
        """Note that the request got its first ``num_computed`` tokens without computing them."""
        request.num_computed = num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self.figures.add_prompt(request)
        self.registrations.add_pending(request)

    def _take_pulled(self, request: Request) -> None:
        """Note that the request owns all blocks of its prompt."""
        request.wants_pull = False
        self._skip_to(request, request.num_pulled_tokens)

    def _on_pull_finished(self, event: PullFinished) -> None:
        pull = self.pulls.finish(event)
        if pull is None:
            return
        if any(pull.block_ids):
            self.figures.add_pull(event)
            if event.ok:
                self.histograms.pulled(event)
        request = pull.request
        if request is None:
            return
        num_tokens = max(0, request.num_pulled_tokens - pull.hit.end(0) * self._block_size)
        request.spans.pulled(event, num_tokens=num_tokens, verifies=self._settings.verify)
        self.queues.wait(request, Phase.READY if event.ok else Phase.WAITING)
        request.wants_pull = False
        if event.ok:
            request.num_remote_tokens = num_tokens
            self._take_pulled(request)
        else:
            self._do_without(request, event.error)

    def _do_without(self, request: Request, cause: str) -> None:
        """Recompute the prompt whose pull has failed, or end the request, by ``on_failure``."""
        logger.warning("pull of request %s failed: %s", request.request_id, cause)
        if self._settings.on_failure == "fail":
            self._finish(
                request, "error", error=f"the prompt's KV blocks could not be pulled: {cause}"
            )
        else:
            self.figures.counts.recomputed_requests += 1

    def _finish_if_complete(
        self, request: Request, token_id: int, token: TokenOutput | None = None
    ) -> bool:
        """End the request if ``token_id`` ends it. ``token``: None if the server knows it."""
        reason = request.end_of(token_id)
        if reason is None:
            return False
        remote_kv = None
        # Before ``_finish``, which frees what is left in the request's tables: a lease takes its
        # blocks out of them.
        if token is not None and (granted := self._leases.grant(request, reason)):
            command, remote_kv = granted
            request.spans.leased(command.lease_s, sum(map(len, command.block_ids)))
            self.commands.append(command)
        self._finish(
            request,
            reason,
            tokens=[] if token is None else [token],
            stop_token_id=token_id if reason == "stop" else None,
            remote_kv=remote_kv,
        )
        return True

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
        """End a request: give back what it holds, unless a step in flight still uses it, and tell
        the server.
        """
        self.histograms.ended(request)
        if request.phase is Phase.PULLING:
            self.commands.append(self.pulls.cancel(request))
        elif request.phase is Phase.LOADING:
            self.host.cancel(request)
        if request.wants_pull and request.phase is not Phase.PULLING:
            self.commands.append(self.pulls.tell_prefill_side(request))
        # A step in flight still writes to its blocks: ``Scheduler.postprocess`` lets it go after
        # that step.
        if not self.in_flight.keep(request):
            self.let_go(request)
        self.queues.end(request)
        self.outputs.finish(
            request,
            reason,
            tokens=tokens,
            stop_token_id=stop_token_id,
            error=error,
            error_param=error_param,
            remote_kv=remote_kv,
        )
