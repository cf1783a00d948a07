"""Chooses what an engine computes next: ``schedule -> run -> postprocess``.

Continuous batching under a token budget, on paged KV. A step holds first the next token of every
request that decodes, then chunks of prompts in order of arrival. When blocks run out, the latest
arrival is preempted: it loses its blocks and computes its tokens again later. While blocks of a
request are pulled from another engine or loaded from host memory, it uses no row and no budget. A
request takes cached blocks on the device first, then pulls or loads more, and computes the rest.
"""

import logging
from collections.abc import Sequence
from itertools import islice

from pdlaunch.engine.kvcache.manager import PrefixHit
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.step import StepPlan
from pdlaunch.observe.spans import SEATED
from pdlaunch.protocol.kv_params import TokenOutput

logger = logging.getLogger(__name__)


# Limit of prompt tokens with log-probabilities in a step: each needs a row of logits, 1 MB with a
# vocabulary of 128,000.
MAX_SCORED_TOKENS = 128


class _Draft:
    """Collects the next step: the number of tokens of each request."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that may still be added
        self.prompt_budget = budget  # tokens of prompts that may still be added, within ``budget``
        self.scored_budget = MAX_SCORED_TOKENS
        self.scheduled: dict[Request, int] = {}
        self.preempted = False

    def room(self, request: Request, num_wanted: int) -> int:
        """Return how many of the wanted tokens may be added; only prompts want more than one."""
        budget = min(self.budget, self.prompt_budget) if num_wanted > 1 else self.budget
        if request.scored is not None:
            budget = min(budget, self.scored_budget)
        return min(num_wanted, budget)

    def add(self, request: Request, num_tokens: int) -> None:
        self.scheduled[request] = num_tokens
        self.budget -= num_tokens
        if num_tokens > 1:
            self.prompt_budget -= num_tokens
        if request.scored is not None:
            self.scored_budget -= num_tokens


class Scheduler:
    """Plans the steps of an engine; lives in rank 0. The step loop alternates ``schedule`` and
    ``postprocess``; ``schedule_ahead`` makes a second plan before the first step has ended. Between
    these calls, the loop, in the same thread, passes messages of server and connectors to
    ``requests``.
    """

    def __init__(self, requests: RequestLifecycle, max_beside_streams: int | None = None) -> None:
        """``max_beside_streams``: limit of prompt tokens in a step that also decodes, if any."""
        self.requests = requests
        self._kv = requests.kv
        self._queues = requests.queues
        self._batch = requests.batch
        self._transfers = requests.transfers
        self._caches = requests.spec.enable_prefix_caching
        self._block_size = requests.spec.block_size
        self._max_num_batched_tokens = requests.spec.max_num_batched_tokens
        self._max_beside_streams = max_beside_streams
        # No running request can go on before copies to host memory release blocks.
        self._stalls = False

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the step after the one in flight, before its tokens are known. Return None if that
        step must be collected first: if there are prompts to compute (planning is short compared
        with such a step, and later arrivals can still join it), if blocks are short, or if a
        request is a suspect or needs its tokens on the host to draw.
        """
        assert len(self._batch.steps) == 1
        arrived = self._queues.waiting if self._batch.free_rows else []
        if any(request.is_suspect for request in (*self._queues.running, *arrived)):
            # If a rank died with two steps in flight, either of them could be the cause.
            return None
        going_on = [request for request in self._queues.running if not request.ends_in_flight]
        if any(
            request.num_to_schedule > 1 or request.draws_from_its_output for request in going_on
        ):
            return None
        if any(request.num_remaining > 1 and not request.wants_pull for request in arrived):
            return None
        num_full = sum(
            request.num_scheduled >= request.tables.end * self._block_size for request in going_on
        )
        has_room = num_full * self._kv.num_groups <= self._kv.pool.num_free_blocks
        return self.schedule() if has_room else None

    def hand_over(self) -> StepPlan:
        return self._with_orders(StepPlan(step_id=-1))

    def has_work(self) -> bool:
        """Return whether ``schedule`` has work now; False if requests only wait for events."""
        computes = self._queues.running and not self._stalls
        orders = self._transfers.commands or self._transfers.jobs or self._batch.freed_rows
        return bool(computes or orders or self.requests.may_progress or self._batch.steps)

    def postprocess(self, plan: StepPlan, drawn: Sequence[TokenOutput | None]) -> None:
        """Account for the oldest step in flight, which has run. ``drawn``: an entry for each scored
        token, then one for each scheduled row with ``sample``, None where its logits were NaN.
        """
        if plan.scheduled:
            num_tokens = sum(item.num_tokens for item in plan.scheduled)
            self.requests.histograms.observe("iteration_tokens_total", num_tokens)
        num_scored = sum(item.num_scored for item in plan.scheduled)
        scored, tokens = iter(drawn[:num_scored]), iter(drawn[num_scored:])
        for item, request in self._batch.collect(plan):
            token = next(tokens) if item.sample else None
            known = [each for each in islice(scored, item.num_scored) if each is not None]
            if request.scored is not None:
                request.scored += known
            if request.phase is Phase.FINISHED:
                # The request ended while the step ran: drop its token.
                if not request.num_in_flight:
                    self.requests.released(request)
                continue
            request.num_computed += item.num_tokens
            # Register blocks before taking the token, which may end the request: blocks that are
            # freed before they are registered cannot be found again.
            self.requests.register(request)
            if item.sample:
                self.requests.take_token(request, token)

    def schedule(self) -> StepPlan:
        # Clear this first: a preemption below sets it again, because it frees blocks for others.
        self.requests.may_progress = False
        step = _Draft(self._max_num_batched_tokens)
        self._schedule_running(step)
        # After a preemption, blocks are short: keep the free ones for running requests.
        if not step.preempted:
            self._schedule_waiting(step)
        self._stalls = bool(self._queues.running) and not step.scheduled
        plan = self._with_orders(self._batch.launch(step.scheduled))
        if plan.scheduled and logger.isEnabledFor(logging.DEBUG):
            work = [f"{each.request_id} computes {n};" for each, n in step.scheduled.items()]
            logger.debug("step %d: %s", plan.step_id, " ".join(work))
        return plan

    def _with_orders(self, plan: StepPlan) -> StepPlan:
        transfers = self._transfers
        plan.commands, transfers.commands = transfers.commands, []
        plan.jobs, transfers.jobs = transfers.jobs, []
        return plan

    def _schedule_running(self, step: _Draft) -> None:
        """Add the next tokens of all running requests, decoding ones before prompts."""
        prompts = []
        # A copy, as a preemption takes requests out of the queue.
        for request in self._queues.running.copy():
            if request.ends_in_flight:
                continue
            if request.num_to_schedule > 1:
                prompts.append(request)
            else:
                self._schedule_chunk(request, step)
        # Only decodes are scheduled so far. They wait while this step computes prompts.
        if step.scheduled and self._max_beside_streams is not None:
            step.prompt_budget = self._max_beside_streams
        for request in prompts:
            self._schedule_chunk(request, step)

    def _schedule_chunk(self, request: Request, step: _Draft) -> None:
        """Add next tokens of a running request; preempt later arrivals if not even one fits."""
        num_tokens = step.room(request, request.num_to_schedule)
        # An earlier request may have preempted it in this step.
        if request.phase is not Phase.RUNNING or num_tokens == 0:
            return
        # From num_computed, not num_scheduled: tokens in flight still read their windows.
        self._kv.release_left(request.tables, request.num_computed)
        if request.num_scheduled + num_tokens > request.tables.end * self._block_size:
            while not (room := self._room(request)):
                # If the request itself came last, it is the victim and is not computed now.
                if self._transfers.frees_blocks_soon() or self._preempt_latest(step) is request:
                    return
            num_tokens = min(num_tokens, room)
            self._kv.extend(request.tables, request.num_scheduled + num_tokens)
        step.add(request, num_tokens)

    def _schedule_waiting(self, step: _Draft) -> None:
        """Start waiting requests in order. One that lacks blocks holds back later ones."""
        lacks_blocks = False
        # A copy, because requests leave the queue inside the loop.
        for request in self._queues.waiting.copy():
            # A READY request is not held back: it owns the blocks of its prompt already.
            if lacks_blocks and request.phase is Phase.WAITING:
                continue
            if request.wants_pull:
                lacks_blocks |= not self._start_pull(request)
            # Two suspects must not run together: it would be unknown which kills the rank.
            has_to_wait = request.is_suspect and any(
                each.is_suspect for each in self._queues.running
            )
            if (
                not request.wants_pull
                and self._batch.free_rows
                and not has_to_wait
                and self.requests.is_compiled(request)
            ):
                lacks_blocks |= not self._admit(request, step)
        nothing_runs = not self._queues.running and not self._batch.steps
        if lacks_blocks and nothing_runs and len(self._queues.ready()) > 1:
            # READY requests hold blocks that other requests need.
            self._preempt_latest(step)

    def _admit(self, request: Request, step: _Draft) -> bool:
        """Seat a request and schedule its first chunk. Return False if it lacks blocks, True also
        if it has to wait for another request, a later step or a load.
        """
        if not step.room(request, request.num_remaining):
            # Later prompts must not go first.
            step.prompt_budget = 0
            return True
        if request.phase is Phase.WAITING:
            if self._caches:
                request.hasher.extend(request.token_ids)
            # The last known token is always computed.
            max_shared = (len(request.token_ids) - 1) // self._block_size if self._caches else 0
            if request.scored is not None:
                max_shared = 0  # only computed tokens have log-probabilities
            hit = self._kv.find_prefix(request.hasher.block_hashes, max_shared)
            if self._is_computed_elsewhere(request, hit, max_shared):
                # Wait a few steps to share these blocks, instead of computing them twice.
                return True
            if not self._has_room_for(request, hit):
                return False
            if self._start_load(request, max_shared):
                return True
            self._kv.share(request.tables, hit)
            self.requests.skip_to(request, request.tables.end * self._block_size)
        room = self._room(request)
        if not room:
            return False
        self.requests.histograms.seated(request)
        self._queues.move(request, Phase.RUNNING)
        device, host, remote = request.cached_tokens
        request.mark(SEATED, device_tokens=device, host_tokens=host, remote_tokens=remote)
        request.row = self._batch.free_rows.pop()
        num_tokens = min(step.room(request, request.num_remaining), room)
        self._kv.extend(request.tables, request.num_computed + num_tokens)
        step.add(request, num_tokens)
        return True

    def _start_load(self, request: Request, max_blocks: int) -> bool:
        """Load blocks that only host memory has. Return False if there are none, or no room."""
        hit = self._transfers.find_on_host(request, max_blocks)
        if hit is None or not self._has_room_for(request, hit.device):
            return False
        if not self._transfers.is_loaded(hit):
            self._transfers.start_load(request, hit)
            self._queues.move(request, Phase.LOADING)
        return True

    def _start_pull(self, request: Request) -> bool:
        """Pull the prompt's blocks that are not cached here. Return False if there is no room. The
        host tier is not used: a READ is faster than a copy from the host (392 against 54 GB/s on an
        H200).
        """
        max_cached = request.num_pulled_tokens // self._block_size if self._caches else 0
        if max_cached and self._transfers.is_pulled(request):
            # Another choice pulls the same prompt: its full blocks will be cached soon.
            return True
        hit = self._kv.find_for_pull(request.prompt_hashes(), max_cached, request.num_pulled_tokens)
        if not self._has_room_for(request, hit):
            return False
        if self._transfers.start_pull(request, hit):
            self._queues.move(request, Phase.PULLING)
            return True
        # All blocks are cached here, so the lease is not needed.
        self._transfers.pull_nothing(request)
        self._kv.share(request.tables, hit)
        self._queues.move(request, Phase.READY)
        request.wants_pull = False
        self.requests.skip_to(request, request.num_pulled_tokens)
        return True

    def _room(self, request: Request) -> int:
        return self._kv.max_tokens(request.tables) - request.num_scheduled

    def _has_room_for(self, request: Request, hit: PrefixHit) -> bool:
        """Return whether a request fits and leaves a free block for each running request."""
        num_running = len(self._queues.running)
        return self._kv.has_room_for(hit, len(request.token_ids), num_reserved=num_running)

    def _is_computed_elsewhere(self, request: Request, hit: PrefixHit, max_shared: int) -> bool:
        """Return whether a running request will compute at least half of the blocks that this
        request could share but are not cached.
        """
        middle = (hit.end(0) + max_shared) // 2
        if middle >= max_shared:
            return False
        block_hash = request.hasher.block_hashes[middle]
        return any(
            other.num_remaining > 1
            and other.num_registered_blocks <= middle < len(other.hasher.block_hashes)
            and other.hasher.block_hashes[middle] == block_hash
            for other in self._queues.running
        )

    def _preempt_latest(self, step: _Draft) -> Request:
        """Preempt the latest arrival that owns blocks: free its blocks and queue it again."""
        assert not self._batch.steps
        victim = self._queues.latest_owner()
        if victim.phase is Phase.RUNNING:
            self._batch.unseat(victim)
        victim.mark("preempted")
        self._queues.move(victim, Phase.WAITING)
        # Store its blocks while it still owns them; later it finds them in host memory.
        self._transfers.store(victim, range(victim.num_registered_blocks))
        self._kv.free(victim.tables)
        victim.num_computed = victim.num_registered_blocks = 0
        victim.may_load = True
        if victim.scored is not None:
            victim.scored.clear()
        self.requests.counts["num_preemptions"] += 1
        self.requests.may_progress = True
        step.budget += step.scheduled.pop(victim, 0)
        step.preempted = True
        return victim
