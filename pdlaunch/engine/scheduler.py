"""Choose what an engine computes next: continuous batching under a token budget, on paged KV.

A step holds first the next token of every request that decodes, then chunks of prompts, in order
of arrival; beside streams a limit of their own may keep these short. When blocks run
out, the latest arrival gives its own back and computes its tokens again later. Requests wait
without row and budget while their blocks are pulled from another engine or loaded from host memory.
A prefix is looked for on the device, then on the host, then at the prefill engine; what is left is
computed.

This module only chooses; ``lifecycle.py`` does what it has chosen.
"""

from __future__ import annotations

import logging

from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.step import StepOutput, StepPlan
from pdlaunch.engine.step_builder import StepDraft
from pdlaunch.protocol.transfer import TransferCommand

logger = logging.getLogger(__name__)


class Scheduler:
    """Plans the steps of an engine; lives in rank 0. Not safe for more than one thread.

    The step loop alternates ``schedule`` and ``postprocess``. With ``schedule_ahead`` it may have a
    second plan before the first one's step has ended (``in_flight.py``). Server and connectors talk
    to ``requests`` in between.
    """

    def __init__(
        self,
        requests: RequestLifecycle,
        *,
        max_num_batched_tokens: int,
        max_beside_streams: int | None = None,
    ) -> None:
        """``max_beside_streams``: most prompt tokens in a step with streams; None: all that fit."""
        self.requests = requests
        self._kv = requests.kv
        self._blocks = requests.blocks
        self._builder = requests.builder
        self._host = requests.host
        self._in_flight = requests.in_flight
        self._pulls = requests.pulls
        self._queues = requests.queues
        self._registrations = requests.registrations
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_beside_streams = max_beside_streams
        self._stalls = False
        """Nothing can be computed before copies to host memory let go of their blocks."""

    def schedule(self) -> StepPlan:
        """Choose what the next step computes, and take the commands for the connectors along.

        No step is in flight.
        """
        assert not self._in_flight
        return self._schedule()

    def schedule_ahead(self) -> StepPlan | None:
        """Choose what follows the one step in flight, before its tokens are known.

        Return None when that step has to be collected first: when there are prompts to compute
        (planning costs nothing beside such a step, and later arrivals can still join it), and when
        a request would have to give up blocks for others, draws from its own output, or is a
        suspect.
        """
        assert len(self._in_flight) == 1
        arrived = self._queues.waiting if self._builder.has_free_row else []
        if any(
            request.is_suspect for queue in (self._queues.running, arrived) for request in queue
        ):
            # With two steps in flight a death could not be blamed on one of them.
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
        """Return a plan that computes nothing, with the commands and jobs that have come up.

        Connectors and host tier must hear of them before the server gets ``outputs``.
        """
        return StepPlan(step_id=-1, commands=self._take_commands(), jobs=self._host.take_jobs())

    def postprocess(self, plan: StepPlan, output: StepOutput) -> None:
        """Account for a step that has run, the oldest in flight; ``output`` is that of rank 0."""
        self.requests.histograms.ran_step(sum(item.num_tokens for item in plan.scheduled))
        tokens = iter(output.tokens)
        for item, request in self._in_flight.collect(plan):
            drawn = next(tokens) if item.sample else None
            if request.phase is Phase.FINISHED:
                # It ended while the step ran: what the step drew for it is dropped.
                if self._in_flight.is_free(request):
                    self.requests.let_go(request)
                continue
            if request.spans.wants_steps:
                of_prompt = request.num_computed < request.num_prompt_tokens
                request.spans.computed(item.num_tokens, of_prompt=of_prompt, step_id=plan.step_id)
            request.num_computed += item.num_tokens
            # Before the token, which may end the request: freed unregistered, its blocks could not
            # be found again.
            self._registrations.register(request)
            if item.sample:
                self.requests.take_token(request, drawn)

    def has_work(self) -> bool:
        """Return whether ``schedule`` has something to do now.

        False while every request waits for a lease, a pull or a copy to end.
        """
        computes = self._queues.running and not self._stalls
        tells = self.requests.commands or self._host.has_jobs or self._builder.has_freed_rows
        return bool(computes or tells or self.requests.may_progress or self._in_flight)

    def _schedule(self) -> StepPlan:
        # First: a preemption below sets it again, as it frees blocks for others.
        self.requests.may_progress = False
        step = StepDraft(self._max_num_batched_tokens)
        self._schedule_running(step)
        # After a preemption blocks are short: a new one would take what running requests need next.
        if not step.preempted:
            self._schedule_waiting(step)
        self._stalls = bool(self._queues.running) and not step.scheduled
        plan = self._builder.build(step.scheduled, self._take_commands(), self._host.take_jobs())
        self._in_flight.launch(plan, [*step.scheduled])
        if logger.isEnabledFor(logging.DEBUG) and not plan.is_empty:
            logger.debug(
                "step %d: %s; %d wait",
                plan.step_id,
                ", ".join(
                    f"{request.request_id} computes {num_tokens}"
                    for request, num_tokens in step.scheduled.items()
                )
                or "nothing to compute",
                len(self._queues.waiting) + self._queues.num_waiting_for_kv,
            )
        return plan

    def _take_commands(self) -> list[TransferCommand]:
        commands, self.requests.commands = self.requests.commands, []
        return commands

    def _schedule_running(self, step: StepDraft) -> None:
        """Add the next tokens of all running requests, decoding ones before prompts."""
        prefilling = []
        for request in self._queues.running.copy():
            if request.ends_in_flight:
                continue
            if request.num_to_schedule > 1:
                prefilling.append(request)
            else:
                self._schedule_chunk(request, step)
        if step.scheduled and self._max_beside_streams is not None:
            step.prompt_budget = self._max_beside_streams
        for request in prefilling:
            self._schedule_chunk(request, step)

    def _schedule_chunk(self, request: Request, step: StepDraft) -> None:
        """Add as many next tokens of a running request as budget and blocks allow.

        Later arrivals give up their blocks so that at least one token fits.
        """
        num_tokens = step.room(request.num_to_schedule)
        # It may have been preempted in this very step, by a request that came before it.
        if request.phase is not Phase.RUNNING or num_tokens == 0:
            return
        # Counted from num_computed: tokens in flight are queries too, and still read their windows.
        self._kv.release_left(request.tables, request.num_computed)
        # 0 ............... num_computed ......... start ............. start + num_tokens
        #   in the KV cache      │     in flight     │  for this step  │
        start = request.num_scheduled
        if start + num_tokens > request.tables.end * self._kv.block_size:
            while not (room := self._blocks.room(request)):
                # The request itself is the victim if it came last; then it is not computed now.
                if self._host.frees_blocks_soon() or self._preempt_latest(step) is request:
                    return
            num_tokens = min(num_tokens, room)
            self._kv.extend(request.tables, start + num_tokens)
        step.add(request, num_tokens)

    def _schedule_waiting(self, step: StepDraft) -> None:
        """Start requests in order of arrival.

        One that lacks blocks holds back the later ones that would take some.
        """
        lacks_blocks = False
        for request in self._queues.waiting.copy():
            # One that is READY goes on: it has the blocks of its prompt already.
            if lacks_blocks and request.phase is Phase.WAITING:
                continue
            if request.phase is Phase.WAITING:
                # Its prefix may be among the blocks that another request has just got.
                self._registrations.register_pending()
            if request.wants_pull:
                lacks_blocks |= not self._start_pull(request)
            if (
                not request.wants_pull
                and self._builder.has_free_row
                and not self._has_to_be_apart(request)
            ):
                if step.room(request.num_remaining):
                    lacks_blocks |= not self._admit(request, step)
                else:
                    # Nobody who came later goes before it.
                    step.prompt_budget = 0
        if lacks_blocks and not self._queues.running and not self._in_flight:
            self._break_standstill(step)

    def _has_to_be_apart(self, request: Request) -> bool:
        """Return whether a suspect has to wait for another one, as no step may hold two."""
        return request.is_suspect and any(other.is_suspect for other in self._queues.running)

    def _admit(self, request: Request, step: StepDraft) -> bool:
        """Seat a request and schedule its first chunk. False: it lacks blocks.

        True also if it had better wait for another request, another step or host memory.
        """
        if request.phase is Phase.WAITING:
            hit = self._blocks.find_prefix(request)
            if self._blocks.is_computed_elsewhere(request, hit, self._queues.running):
                # It shares these blocks a few steps later instead of computing them twice.
                return True
            if not self._blocks.has_room_for(request, hit, len(self._queues.running)):
                return False
            if self._start_load(request):
                return True
            num_cached = hit.end(0) * self._kv.block_size
            if not step.room(request.num_remaining - num_cached):
                step.prompt_budget = 0
                return True
            self.requests.share(request, hit)
        room = self._blocks.room(request)
        if not room:
            return False
        self.requests.seat(request)
        num_tokens = min(step.room(request.num_remaining), room)
        self._kv.extend(request.tables, request.num_computed + num_tokens)
        step.add(request, num_tokens)
        return True

    def _start_load(self, request: Request) -> bool:
        """Load what host memory has and the device lacks. False: there is nothing of that kind."""
        hit = self._host.find(request, self._blocks.max_loadable(request))
        if hit is None or not self._blocks.has_room_for(
            request, hit.device, len(self._queues.running)
        ):
            return False
        if not self._host.is_waited_for(hit):
            self.requests.load(request, hit)
        return True

    def _start_pull(self, request: Request) -> bool:
        """Pull the prompt's blocks that are not cached here. False: there is no room for them."""
        if self._blocks.gains_from_sibling(request) and self._pulls.is_waited_for(request):
            # Another choice of the same prompt: its full blocks will be in the cache soon.
            return True
        hit = self._blocks.find_for_pull(request)
        if not self._blocks.has_room_for(request, hit, len(self._queues.running)):
            return False
        if self._start_load(request):
            return True
        self.requests.pull(request, hit)
        return True

    def _preempt_latest(self, step: StepDraft) -> Request:
        """Preempt the latest arrival that owns blocks and waits for no connector."""
        victim = self._queues.latest_owner()
        self.requests.preempt(victim)
        step.remove(victim)
        step.preempted = True
        return victim

    def _break_standstill(self, step: StepDraft) -> None:
        """Preempt the latest of several READY requests that hold each other's blocks.

        Nothing runs that could free any.
        """
        if len(self._queues.ready()) > 1:
            self._preempt_latest(step)
