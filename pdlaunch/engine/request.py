"""Holds the state of a request in the scheduler, the queues in which requests wait and run, and the
batch of running requests.
"""

import enum
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pdlaunch.engine.kvcache.hashing import TokenHasher
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.kvcache.prefix_keys import PrefixKeys
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.observe.spans import PREFILL, PULL, QUEUE, Attribute, SpanLog, SpanReport
from pdlaunch.protocol.engine import AddRequest, FinishReason
from pdlaunch.protocol.ids import PullId, RequestId
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.process.step_record import SUSPECT_BIT
from pdlaunch.protocol.transfer import PullFinished

RANK = "rank-{}"  # names the process of a rank within its engine


class Phase(enum.Enum):
    """Names the phases of a request, and what the request owns in each.

    WAITING ──▶ RUNNING ──▶ FINISHED        every phase may end in FINISHED (abort, error)
     │ ▲  ▲      │  ▲
     │ │  └──────┘  │     preempted: has to find, load or compute all its tokens again
     │ └───────┐    │
     ▼         │    │
    LOADING ─▶ READY┤     a failed load or pull leads back to WAITING, a preempted READY too
    PULLING ─▶ READY┘
    """

    WAITING = "waiting"  # it is queued and owns no block
    # It waits for blocks from host memory, and owns the cached blocks that it shares
    LOADING = "loading"
    # It waits for blocks of another engine, and owns the cached blocks that it shares
    PULLING = "pulling"
    READY = "ready"  # it is queued and owns the blocks of its computed tokens
    RUNNING = "running"  # it is in the batch and owns a row and blocks
    FINISHED = "finished"


QUEUED = (Phase.WAITING, Phase.READY)


@dataclass(eq=False, repr=False)
class Request:
    """Holds the state of one request.

    ``token_ids`` is prompt and output; its first ``num_computed`` tokens are in the KV cache::

        0 ............ num_computed ........ num_scheduled ........ len(token_ids) + num_unknown
          in the KV cache    │    in flight        │    to schedule   │
    """

    message: AddRequest
    arrival: int
    # Limit of output tokens: max_tokens, or what max_model_len leaves.
    output_limit: int
    tables: BlockTables
    hasher: TokenHasher
    prefix_keys: PrefixKeys

    def __post_init__(self) -> None:
        message = self.message
        # Its place in the queues, lower priorities first; kept through preemption.
        self.order = (message.priority, self.arrival)
        self.token_ids = message.prompt_token_ids + [token.token_id for token in message.output]
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.phase = Phase.WAITING
        self.num_computed = 0
        self.num_in_flight = 0  # tokens after the computed ones that the steps in flight compute
        self.num_unknown = 0  # output tokens that the steps in flight draw
        # Prompt tokens cached, loaded or pulled instead of computed; None until this is known.
        self.num_cached_tokens: int | None = None
        # Prompt tokens that came from host memory by a load, and from another engine by a pull.
        self.num_host_tokens = self.num_remote_tokens = 0
        self.num_registered_blocks = 0  # logical blocks that are registered in the prefix cache
        self.row: int | None = None
        # Logical blocks that were sent to the ranks; None if the row was not sent yet.
        self.num_sent_blocks: int | None = None
        # The prefill side still counts this request as a reader of its lease.
        self.wants_pull = message.remote_kv is not None
        # False once a load has ended, even if it failed; True again after a preemption.
        self.may_load = True
        # Id of the pull or load that the request waits for.
        self.incoming: PullId | int | None = None
        # The grammar, perhaps still compiling; given back when row and blocks are freed.
        self.grammar: Future[Any] | None = None
        wants_scores = message.sampling.num_prompt_logprobs is not None
        # The prompt's tokens from the second on, with log-probabilities; None: not requested,
        # or already sent.
        self.scored: list[TokenOutput] | None = [] if wants_scores else None
        # The request may have killed a rank; False once a step here has drawn a token for it.
        self.is_suspect = message.is_suspect
        # queue │ lease │ pull │ queue │ prefill │ decode
        #       └─ the ranks' READs and proofs ─┘
        self.spans = SpanLog() if message.records_spans else None
        # When the request last began to wait or to run; only used for spans.
        self.phase_at = 0.0 if self.spans is None else self.spans.start_at
        # Instants, for the histograms: arrival, first step, first and latest token drawn here.
        self.arrived_at = self.last_at = 0.0
        self.started_at: float | None = None
        self.first_at: float | None = None
        self.num_drawn = 0

    @property
    def request_id(self) -> RequestId:
        return self.message.request_id

    @property
    def cached_tokens(self) -> tuple[int, int, int]:
        """Return how many prompt tokens came from device, host and another engine."""
        num_cached = self.num_cached_tokens or 0
        num_remote = min(self.num_remote_tokens, num_cached)
        num_host = min(self.num_host_tokens, num_cached - num_remote)
        return num_cached - num_remote - num_host, num_host, num_remote

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Return how many known tokens are not computed yet; 1 while the request decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_scheduled(self) -> int:
        """Return how many tokens are computed or in flight; the next step begins after them."""
        return self.num_computed + self.num_in_flight

    @property
    def num_to_schedule(self) -> int:
        """Return how many tokens no launched step computes; 1 while the request decodes."""
        return len(self.token_ids) + self.num_unknown - self.num_scheduled

    @property
    def ends_in_flight(self) -> bool:
        """Return whether the steps in flight reach the limit of output tokens."""
        num_drawn = self.num_output_tokens + self.num_unknown
        return self.num_unknown > 0 and num_drawn >= self.output_limit

    @property
    def draws_from_its_output(self) -> bool:
        """Return whether drawing a token needs all earlier tokens on the host."""
        sampling = self.message.sampling
        return sampling.needs_output or bool(sampling.grammar)

    def take_scored(self) -> list[TokenOutput]:
        if self.scored is None:
            return []
        scored, self.scored = [TokenOutput(token_id=self.token_ids[0]), *self.scored], None
        return scored

    @property
    def num_pulled_tokens(self) -> int:
        """Return how many tokens count as computed after a pull: the whole prompt."""
        # Without an output token, the last prompt token is computed here, to draw the first one.
        return self.num_prompt_tokens - (self.num_output_tokens == 0)

    def mark(self, name: str, /, **attributes: Attribute) -> None:
        if self.spans is not None:
            self.spans.mark(name, **attributes)

    def add_pull(self, event: PullFinished, *, num_tokens: int, verifies: bool) -> None:
        """Record the end of the request's pull, with the ranks' spans."""
        if (log := self.spans) is None:
            return
        asked_at, now_at = self.phase_at, log.clock()
        start_at = max(asked_at, now_at - event.seconds)
        log.add("lease", asked_at, start_at)
        log.add(
            PULL,
            start_at,
            now_at,
            bytes=event.num_bytes,
            gb_s=round(event.num_bytes / event.read_s / 1e9, 3) if event.read_s else None,
            verified=event.ok and verifies,
            tokens=num_tokens if event.ok else 0,
            retries=event.counts.get("kv_pull_retries", 0),
            error=event.error or None,
        )
        for tp_rank, told in event.reports.items():
            log.take(told, sent_at=asked_at, received_at=now_at, process=RANK.format(tp_rank))

    def report_spans(self, reason: FinishReason | None = None) -> SpanReport | None:
        """Return the spans since the last report, if any. Called with the first token that is drawn
        here, and at the end of the request with its ``reason``.
        """
        if (log := self.spans) is None:
            return None
        num_computed = self.num_prompt_tokens - (self.num_cached_tokens or 0)
        if self.num_drawn == 1 and num_computed and self.phase_at < self.last_at:
            log.add(PREFILL, self.phase_at, self.last_at, tokens=num_computed)
            self.phase_at = self.last_at
        if reason is not None:
            if self.last_at > self.phase_at:
                log.add("decode", self.phase_at, self.last_at, tokens=self.num_output_tokens)
            log.mark("end", reason=reason, tokens=self.num_output_tokens)
        report = log.report(RANK.format(0))
        log.spans.clear()
        log.num_dropped = 0
        return report

    def prompt_hashes(self) -> list[bytes]:
        return self.hasher.prompt_hashes(self.token_ids, self.num_prompt_tokens)

    def end_of(self, token_id: int) -> FinishReason | None:
        sampling = self.message.sampling
        if token_id in sampling.stop_token_ids and self.num_output_tokens >= sampling.min_tokens:
            return "stop"
        return "length" if self.num_output_tokens >= self.output_limit else None


class RequestQueues:
    """Holds requests from arrival to end; both queues are sorted by priority, then by arrival."""

    def __init__(self) -> None:
        self.by_id: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._queue_of = {
            Phase.WAITING: self.waiting,
            Phase.READY: self.waiting,
            Phase.RUNNING: self.running,
        }

    @property
    def num_waiting_for_kv(self) -> int:
        return len(self.by_id) - len(self.waiting) - len(self.running)

    def add(self, request: Request) -> None:
        self.by_id[request.request_id] = request
        insort(self.waiting, request, key=attrgetter("order"))

    def move(self, request: Request, phase: Phase) -> None:
        before, after = self._queue_of.get(request.phase), self._queue_of.get(phase)
        if (log := request.spans) is not None and not (request.phase in QUEUED and phase in QUEUED):
            if request.phase in QUEUED:
                log.add(QUEUE, request.phase_at)
            if phase is not Phase.FINISHED:
                request.phase_at = log.clock()
        request.phase = phase
        if before is not after:
            # ``remove`` searches in C, by identity: some microseconds in a queue of a thousand.
            if before is not None:
                before.remove(request)
            if after is not None:
                insort(after, request, key=attrgetter("order"))
        if phase is Phase.FINISHED:
            del self.by_id[request.request_id]

    def ready(self) -> list[Request]:
        return [request for request in self.waiting if request.phase is Phase.READY]

    def latest_owner(self) -> Request:
        """Return the request that comes last, by priority and arrival, of those with blocks."""
        return max(self.ready()[-1:] + self.running[-1:], key=attrgetter("order"))

    def check_integrity(self) -> None:
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=attrgetter("order"))
        for request in self.by_id.values():
            for queue in (self.waiting, self.running):
                assert (request in queue) == (self._queue_of.get(request.phase) is queue)
            assert request.phase is not Phase.FINISHED
            assert (request.row is not None) == (request.phase is Phase.RUNNING)
            assert request.tables.end == 0 or request.phase in (Phase.READY, Phase.RUNNING)


class Batch:
    """Assigns requests to rows, 0 <= row < ``max_num_seqs``, builds the plans of steps, and tracks
    the steps in flight.

    ::

        step N     launch ──────────── collect, postprocess
        step N+1                launch ──────────────────── collect, postprocess

    Plans hold only what the ranks do not know yet. For ranks other than 0 they hold sampled tokens,
    too. A request that ends while steps compute it keeps its row and its blocks until the last of
    these steps has been collected, because the steps still write to them.
    """

    def __init__(self, max_num_seqs: int, tp_size: int) -> None:
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.freed_rows: list[int] = []  # rows that the next plan reports to the ranks as free
        # Plans in flight that compute something, with their requests; at most two.
        self.steps: deque[tuple[StepPlan, list[Request]]] = deque()
        self._shares_tokens = tp_size > 1
        self._sampled: list[Request] = []
        self._step_id = 0

    def unseat(self, request: Request) -> None:
        """Free the request's row. In the next plan, the ranks free it before they add new rows."""
        assert request.row is not None
        self.free_rows.append(request.row)
        # If the row was never sent, the ranks have nothing to free.
        if request.num_sent_blocks is not None:
            self.freed_rows.append(request.row)
        request.row = request.num_sent_blocks = None

    def add_sampled(self, request: Request) -> None:
        """Add the request's last token, which rank 0 has sampled, to the next plan, if needed."""
        if self._shares_tokens:
            self._sampled.append(request)

    def launch(self, scheduled: Mapping[Request, int]) -> StepPlan:
        """Return the plan of a step. If it computes anything, it is in flight until ``collect``."""
        plan = StepPlan(step_id=self._step_id, freed_rows=self.freed_rows)
        self._step_id += 1
        for request in self._sampled:
            if request.row is not None:  # the request may have lost its row since
                at = len(request.token_ids) - 1
                token_ids = request.token_ids[at:]
                plan.new_tokens.append(RowTokens(row=request.row, position=at, token_ids=token_ids))
        self._sampled, self.freed_rows = [], []
        # The step returns its tokens in this order.
        for request, num_tokens in scheduled.items():
            self._add(plan, request, num_tokens)
        if plan.scheduled:
            self.steps.append((plan, [*scheduled]))
        return plan

    def collect(self, plan: StepPlan) -> Iterator[tuple[ScheduledRow, Request]]:
        """Remove the oldest step from all counts; yield its rows and their requests."""
        if not plan.scheduled:
            return
        oldest, requests = self.steps.popleft()
        assert oldest is plan
        for item, request in zip(plan.scheduled, requests, strict=True):
            request.num_in_flight -= item.num_tokens
            request.num_unknown -= item.sample
            yield item, request

    def marks(self) -> list[int]:
        """Return what ``StepRecord`` stores of all requests in flight: origin and suspect bit."""
        return [
            request.message.origin | (SUSPECT_BIT if request.is_suspect else 0)
            for _, requests in self.steps
            for request in requests
        ]

    def ended(self) -> set[Request]:
        """Return the requests that have ended and still own a row and blocks."""
        requests = {request for _, requests in self.steps for request in requests}
        return {request for request in requests if request.phase is Phase.FINISHED}

    def check_integrity(self, owners: set[Request]) -> None:
        """Check rows, and the counts of ``owners``: all unfinished requests, and those of
        ``ended``.
        """
        in_flight: Counter[Request] = Counter()
        unknown: Counter[Request] = Counter()
        for plan, requests in self.steps:
            for item, request in zip(plan.scheduled, requests, strict=True):
                in_flight[request] += item.num_tokens
                unknown[request] += item.sample
        assert in_flight.keys() <= owners
        for request in owners:
            assert request.num_in_flight == in_flight[request]
            assert request.num_unknown == unknown[request]
            assert not request.num_in_flight or request.row is not None
        rows = [request.row for request in owners if request.row is not None]
        assert len({*rows, *self.free_rows}) == len(rows) + len(self.free_rows)

    def _add(self, plan: StepPlan, request: Request, num_tokens: int) -> None:
        row, tables = request.row, request.tables
        assert row is not None
        if request.num_sent_blocks is None:
            plan.new_rows.append(
                NewRow(
                    row=row,
                    request_id=request.request_id,
                    token_ids=request.token_ids.copy(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    sampling=request.message.sampling,
                )
            )
            request.num_sent_blocks = 0
        if request.num_sent_blocks < tables.end:
            for group, first in enumerate(tables.first):
                begin = max(request.num_sent_blocks, first)
                if ids := tables.between(group, begin, tables.end):
                    plan.new_blocks.append(
                        NewBlocks(row=row, group=group, first_block_index=begin, block_ids=ids)
                    )
            request.num_sent_blocks = tables.end
        # A step that computes the last known token draws the next one. Tokens in flight count as
        # known, because the device looks them up.
        start, samples = request.num_scheduled, num_tokens == request.num_to_schedule
        num_scored = 0
        if request.scored is not None:
            num_scored = max(0, min(num_tokens, request.num_prompt_tokens - 1 - start))
        plan.scheduled.append(
            ScheduledRow(
                row=row,
                num_computed_tokens=start,
                num_tokens=num_tokens,
                sample=samples,
                num_scored=num_scored,
            )
        )
        request.num_in_flight += num_tokens
        request.num_unknown += samples
