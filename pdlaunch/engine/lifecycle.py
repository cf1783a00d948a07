"""Keeps the requests of an engine from their arrival to their last message to the server.

``scheduler.py`` chooses which of them are loaded, pulled, computed and preempted. This module
handles messages, events of connectors and host tier, drawn tokens, and the end of requests.

``Histograms`` measures the times of requests, the sizes of steps, and pulls.
"""

import logging
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.grammar import Grammars
from pdlaunch.engine.kv_requests import KVTransfers
from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.engine.kvcache.manager import KVCacheManager
from pdlaunch.engine.kvcache.prefix_keys import PrefixChanges, PrefixKeys, root_key
from pdlaunch.engine.offload.planner import JobFinished, OffloadPlanner
from pdlaunch.engine.request import Batch, Phase, Request, RequestQueues
from pdlaunch.observe.counters import HISTOGRAMS
from pdlaunch.protocol import engine, transfer
from pdlaunch.protocol.ids import EngineId, RequestId, lease_of
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.kv_params import RemoteKV, TokenOutput


class Histograms:
    """Holds the histograms of an engine. The instants of a request are stored in the request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._series: dict[tuple[str, tuple[str, ...]], engine.HistogramSeries] = {}

    def shown(self) -> list[engine.HistogramSeries]:
        """Return the histograms themselves, not copies: later observations change them."""
        return list(self._series.values())

    def arrived(self, request: Request) -> None:
        request.arrived_at = self._clock()

    def seated(self, request: Request) -> None:
        # A request that is seated again after a preemption keeps its first time.
        if request.started_at is None:
            request.started_at = self._clock()

    def drew_token(self, request: Request) -> None:
        request.last_at = self._clock()
        if request.first_at is None:
            request.first_at = request.last_at
        request.num_drawn += 1

    def ended(self, request: Request) -> None:
        """Observe the times of a request that has ended, unless it never was in the batch."""
        start_at, first_at, last_at = request.started_at, request.first_at, request.last_at
        if start_at is None:
            return
        self.observe("request_queue_time_seconds", start_at - request.arrived_at)
        if first_at is None:
            return
        self.observe("request_prefill_time_seconds", first_at - start_at)
        self.observe("request_decode_time_seconds", last_at - first_at)
        self.observe("request_inference_time_seconds", last_at - start_at)
        if request.num_drawn > 1:
            per_token_s = (last_at - first_at) / (request.num_drawn - 1)
            self.observe("request_time_per_output_token_seconds", per_token_s)

    def pulled(self, event: transfer.PullFinished) -> None:
        labels = (event.prefill, event.path)
        self.observe("kv_pull_seconds", event.seconds, labels)
        self.observe("kv_pull_bytes", event.num_bytes, labels)
        if read_s := event.read_s or event.seconds:
            self.observe("kv_pull_bytes_per_second", event.num_bytes / read_s, labels)

    def observe(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        bounds = HISTOGRAMS[name].bounds
        series = self._series.get((name, labels))
        if series is None:
            series = engine.HistogramSeries(
                name=name, labels=labels, counts=[0] * (len(bounds) + 1)
            )
            self._series[name, labels] = series
        series.counts[bisect_left(bounds, value)] += 1
        series.sum += value


logger = logging.getLogger(__name__)

NAN_LOGITS = (
    "the model's logits for this request are not numbers (NaN), so no token can be drawn; "
    "look for overflow in its dtype, or for damaged weights"
)
LOST_GRAMMAR = (
    "no token can be drawn: the grammar is too complex to follow, the output so far does not fit "
    "it, or the model's logits are not numbers (NaN)"
)


@dataclass(eq=False)
class RequestLifecycle:
    """Owns the requests of an engine with their rows, blocks, leases, pulls and loads."""

    spec: EngineSpec
    groups: Sequence[KVCacheGroup]
    num_blocks: int
    model_digest: str
    engine_id: EngineId
    port: int  # of the side channel, from which other engines pull leases granted here
    grammars: Grammars
    wake: Callable[[], None] = lambda: None  # wakes the step loop; called from any thread
    offload: OffloadPlanner | None = None

    def __post_init__(self) -> None:
        spec, offload = self.spec, self.offload
        assert offload is None or spec.enable_prefix_caching
        self.kv = KVCacheManager(self.groups, self.num_blocks, spec.block_size)
        # Longest prompt plus output; its last token needs no slot, because it is never computed.
        lengths = range(spec.max_model_len)
        self.max_model_len = bisect_right(lengths, self.num_blocks, key=self.kv.min_blocks)
        self.queues = RequestQueues()
        self.batch = Batch(spec.max_num_seqs, spec.tensor_parallel_size)
        self.histograms = Histograms()
        # Totals since the start, by the names of ``COUNTERS``.
        self.counts: defaultdict[str, float] = defaultdict(int)
        self.transfers = KVTransfers(self.kv, spec, self.counts, self.engine_id, self.port, offload)
        self._prefixes = PrefixChanges()
        self.kv.pool.on_change = partial(self._prefixes.note, "device")
        if offload is not None:
            offload.tier.on_change = partial(self._prefixes.note, "host")
        # A waiting request may be able to start now; the scheduler clears this.
        self.may_progress = False
        self._outputs: list[engine.Tokens | engine.RequestFinished] = []
        self._num_arrived = 0

    # Messages from the server

    def add(self, message: engine.AddRequest) -> None:
        """Take a request; end it at once if it can never be served."""
        room = self.max_model_len - len(message.prompt_token_ids)
        output_limit = min(message.sampling.max_tokens, room)
        if message.do_remote_decode:
            # The lease is on the prompt, whose blocks later tokens would push out of the windows.
            output_limit = min(output_limit, 1)
        hasher = TokenHasher(
            root_hash(self.model_digest, cache_salt=message.cache_salt), self.spec.block_size
        )
        self._num_arrived += 1
        prefix_keys = PrefixKeys(root_key(cache_salt=message.cache_salt), self.spec.block_size)
        request = Request(
            message, self._num_arrived, output_limit, self.kv.new_tables(), hasher, prefix_keys
        )
        self.histograms.arrived(request)
        self.queues.add(request)
        self.may_progress = True
        if error := self._refusal(request):
            self._finish(request, "error", error=error)
        elif message.output:
            self._finish_if_complete(request, message.output[-1].token_id)
        if request.phase is Phase.FINISHED:
            return
        if request.scored is not None and request.wants_pull:
            # The engine has log probabilities only of prompts that it computes.
            self.transfers.pull_nothing(request)
            request.wants_pull = False
        if message.sampling.grammar:
            request.grammar = self.grammars.take(message.sampling.grammar)
            request.grammar.add_done_callback(self._on_compiled)

    def _on_compiled(self, _: object) -> None:
        self.may_progress = True
        self.wake()

    def is_compiled(self, request: Request) -> bool:
        """Return whether the request's grammar is ready; end the request if compiling failed."""
        if request.grammar is None:
            return True
        if request.grammar.done() and (error := request.grammar.exception()) is not None:
            self._finish(request, "error", error=f"the grammar cannot be used: {error}")
            return False
        return request.grammar.done()

    def _refusal(self, request: Request) -> str | None:
        """Return why this engine cannot serve the request, or None if it can."""
        if request.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if request.num_prompt_tokens >= self.max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens; only {self.max_model_len} fit "
                "with the output; shorten the prompt, or raise max_model_len or kv_cache_memory"
            )
        return None

    def abort(self, request_id: RequestId) -> None:
        """End a request, or the lease of a finished one. Unknown ids are ignored."""
        if request_id in self.queues.by_id:
            self._finish(self.queues.by_id[request_id], "abort")
        elif (lease_id := lease_of(request_id)) in self.transfers.leases:
            self.transfers.commands.append(transfer.EndLease(lease_id=lease_id))

    def abort_all(self) -> None:
        """End every request, because the server has restarted. Leases stay for their readers."""
        for request in list(self.queues.by_id.values()):
            self._finish(request, "abort")

    def reset_prefix_cache(self) -> None:
        assert not self.queues.by_id
        self.kv.pool.forget_cached()

    # Events of the connectors and of the host tier, already merged over all TP ranks

    def on_transfer_event(self, event: transfer.TransferEvent) -> None:
        self.may_progress = True
        match event:
            case transfer.LeaseEnded():
                self.counts["kv_leases_expired"] += event.reason == "expired"
                self.transfers.end_lease(event.lease_id)
            case transfer.PullFinished():
                self._on_pull_finished(event)
            case transfer.PullDrained():
                self.transfers.drained(event.pull_id)

    def _on_pull_finished(self, event: transfer.PullFinished) -> None:
        pull = self.transfers.finish_pull(event)
        if pull is None:
            return
        if any(pull.block_ids):
            self._count_pull(event)
        request = pull.request
        if request is None:
            return
        # Group 0 is a full group if there is any, so its hit starts at the prompt's first token.
        num_tokens = max(0, request.num_pulled_tokens - pull.hit.end(0) * self.spec.block_size)
        request.add_pull(event, num_tokens=num_tokens, verifies=self.spec.kv_transfer.verify)
        self.queues.move(request, Phase.READY if event.ok else Phase.WAITING)
        request.wants_pull = False
        if event.ok:
            request.num_remote_tokens = num_tokens
            self.skip_to(request, request.num_pulled_tokens)
            return
        logger.warning("pull of request %s failed: %s", request.request_id, event.error)
        if self.spec.kv_transfer.on_failure == "fail":
            error = f"the prompt's KV blocks could not be pulled: {event.error}"
            self._finish(request, "error", error=error)
        else:
            self.counts["kv_recomputed_requests"] += 1

    def _count_pull(self, event: transfer.PullFinished) -> None:
        counts = self.counts
        if event.ok:
            counts["kv_transfers"] += 1
            counts["kv_transfer_bytes"] += event.num_bytes
            counts["kv_transfer_seconds"] += event.seconds
            self.histograms.pulled(event)
        else:
            counts["kv_transfer_failures"] += 1
        for name, number in event.counts.items():
            counts[name] += number

    def on_job_finished(self, report: JobFinished) -> None:
        """Account for a load or store that all ranks have ended."""
        self.may_progress = True
        load = self.transfers.finish_job(report)
        if load is None or load.request is None:
            return
        request = load.request
        # Even after a failure: a second load would find the same blocks, or fail in the same way.
        request.may_load = False
        num_tokens = len(load.block_ids[0]) * self.spec.block_size
        if request.spans is not None:
            request.spans.add("load from host", request.phase_at, ok=report.ok, tokens=num_tokens)
        self.queues.move(request, Phase.READY if report.ok else Phase.WAITING)
        if report.ok:
            request.num_host_tokens = num_tokens
            self.skip_to(request, request.tables.end * self.spec.block_size)
        else:
            logger.warning(
                "load of request %s from host memory failed: %s", request.request_id, report.error
            )

    # Tokens and blocks

    def take_token(self, request: Request, token: TokenOutput | None) -> None:
        """Append a token that a step has drawn. None, for NaN logits, ends the request."""
        if token is None:
            logger.error("request %s ends: no token can be drawn", request.request_id)
            has_grammar = bool(request.message.sampling.grammar)
            self._finish(request, "error", error=LOST_GRAMMAR if has_grammar else NAN_LOGITS)
            return
        request.token_ids.append(token.token_id)
        request.is_suspect = False  # no rank died of this step
        self.counts["sampled_tokens"] += 1
        self.histograms.drew_token(request)
        if not self._finish_if_complete(request, token.token_id, token):
            self.batch.add_sampled(request)
            spans = request.report_spans() if request.num_drawn == 1 else None
            self._outputs.append(
                engine.Tokens(
                    request_id=request.request_id,
                    tokens=[token],
                    prompt=request.take_scored(),
                    spans=spans,
                )
            )

    def register(self, request: Request) -> None:
        """Let other requests find the blocks that this request has filled, on device and host."""
        # Return early: this runs for each request of each step, and most tokens fill no block.
        start, stop = request.num_registered_blocks, request.num_computed // self.kv.block_size
        if start >= stop or not self.spec.enable_prefix_caching:
            return
        request.hasher.extend(request.token_ids)
        request.prefix_keys.extend(request.token_ids, stop)
        hashes, keys = request.hasher.block_hashes, request.prefix_keys.keys
        self._prefixes.names = dict(zip(hashes[start:stop], keys[start:stop], strict=True))
        self.kv.register(request.tables, hashes, start, stop)
        request.num_registered_blocks = stop
        # Store blocks when they are full, not when they are evicted: then the new owner of a block
        # would have to wait for the copy.
        self.transfers.store(request, range(start, stop))

    def skip_to(self, request: Request, num_computed: int) -> None:
        request.num_computed = num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self._count_prompt(request)
        self.register(request)

    def _count_prompt(self, request: Request) -> None:
        num_tokens, counts = request.num_prompt_tokens, self.counts
        device, host, remote = request.cached_tokens
        counts["prefix_cache_queries"] += num_tokens
        counts["prefix_cache_hits"] += device
        counts["external_prefix_cache_queries"] += num_tokens - device
        counts["external_prefix_cache_hits"] += host + remote
        counts["prompt_tokens_cached"] += device + host + remote
        counts["prompt_tokens_by_source/local_compute"] += num_tokens - device - host - remote
        counts["prompt_tokens_by_source/local_cache_hit"] += device
        counts["prompt_tokens_by_source/external_kv_transfer"] += host + remote
        counts["prompt_tokens_cached_by_source/device"] += device
        counts["prompt_tokens_cached_by_source/host"] += host
        counts["prompt_tokens_cached_by_source/p2p"] += remote

    # The end of a request

    def _finish_if_complete(
        self, request: Request, token_id: int, token: TokenOutput | None = None
    ) -> bool:
        """End the request if ``token_id`` ends it. ``token``: None if the server knows it."""
        reason = request.end_of(token_id)
        if reason is None:
            return False
        # Grant the lease before ``_finish`` frees the request's blocks: the lease takes over some
        # of them.
        remote_kv = None if token is None else self.transfers.grant(request, reason)
        self._finish(request, reason, token=token, ending=token_id, remote_kv=remote_kv)
        return True

    def _finish(
        self,
        request: Request,
        reason: engine.FinishReason,
        *,
        token: TokenOutput | None = None,
        ending: int | None = None,
        error: str | None = None,
        remote_kv: RemoteKV | None = None,
    ) -> None:
        """End a request and report this to the server. Free its row and blocks, unless a step in
        flight still uses them. ``ending``: id of the last token; ``token``: that token, if it is
        new to the server.
        """
        self.histograms.ended(request)
        # Before the phase changes, because ``cancel`` reads from it whether this is a pull.
        if request.incoming is not None:
            self.transfers.cancel(request)
        elif request.wants_pull:
            self.transfers.pull_nothing(request)
        # While a step in flight writes to its blocks, they stay: ``postprocess`` frees them later.
        if not request.num_in_flight:
            self.released(request)
        self.queues.move(request, Phase.FINISHED)
        self._outputs.append(
            engine.RequestFinished(
                request_id=request.request_id,
                reason=reason,
                tokens=[] if token is None else [token],
                prompt=[] if token is None else request.take_scored(),
                stop_token_id=ending if reason == "stop" else None,
                error=error,
                num_cached_tokens=request.num_cached_tokens or 0,
                remote_kv=remote_kv,
                spans=request.report_spans(reason),
            )
        )

    def released(self, request: Request) -> None:
        """Free the row, grammar and blocks of an ended request that no step in flight computes."""
        if request.row is not None:
            self.batch.unseat(request)
        if request.grammar is not None:
            self.grammars.give_back(request.message.sampling.grammar)
        self.kv.free(request.tables)
        self.may_progress = True

    # State

    def take_outputs(self) -> list[engine.Tokens | engine.RequestFinished]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_blocks(self, *, every: bool = False) -> KVBlocks | None:
        """Return the prefixes gained and lost since the last call, or ``every`` cached prefix."""
        num_blocks = self.kv.pool.num_blocks // self.kv.num_groups
        new = partial(KVBlocks, block_size=self.kv.block_size, num_blocks=num_blocks)
        if every:
            return new(is_all=True, stored=self._prefixes.held())
        if (changes := self._prefixes.take()) is None:
            return None
        return new(stored=changes[0], removed=changes[1])

    def stats(self) -> engine.EngineStats:
        return engine.EngineStats(
            num_blocks=self.kv.pool.num_blocks,
            num_running=len(self.queues.running),
            num_waiting=len(self.queues.waiting),
            num_waiting_for_kv=self.queues.num_waiting_for_kv,
            num_free_blocks=self.kv.pool.num_free_blocks,
            **self.transfers.present(),
            counts={**self.counts},
        )

    def check_integrity(self) -> None:
        owners = {*self.queues.by_id.values()} | self.batch.ended()
        self.transfers.check_integrity(owners)
        self.queues.check_integrity()
        self.batch.check_integrity(owners)
        for request in owners:
            assert request.num_scheduled <= request.tables.end * self.spec.block_size
