"""Seats requests on rows, makes the plans of steps, and remembers the steps in flight.

    step N     launch ──────────── collect, postprocess
    step N+1                launch ──────────────────── collect, postprocess

Plans hold only what ranks do not know yet. A request that ends while a step computes it keeps
its row and its blocks until the last such step has been collected: the step still writes to them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.protocol.process.step_record import SUSPECT_BIT


class Batch:
    """Owns the rows 0 <= row < ``max_num_seqs``. Other ranks are sent sampled tokens."""

    def __init__(self, max_num_seqs: int, tp_size: int) -> None:
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.freed_rows: list[int] = []
        """Rows that have ended, of which the ranks have yet to hear."""
        self.steps: deque[tuple[StepPlan, list[Request]]] = deque()
        """Plans with something to compute that are not collected: at most two."""
        self._shares_tokens = tp_size > 1
        self._sampled: list[Request] = []
        self._step_id = 0

    def seat(self, request: Request) -> None:
        request.row = self.free_rows.pop()

    def unseat(self, request: Request) -> None:
        """Take the request's row back; the ranks hear of it in the next plan, before new rows."""
        assert request.row is not None
        self.free_rows.append(request.row)
        # Ranks that have never heard of the row have nothing to free.
        if request.num_sent_blocks is not None:
            self.freed_rows.append(request.row)
        request.row = request.num_sent_blocks = None

    def add_sampled(self, request: Request) -> None:
        """Note that rank 0 has sampled the request's last token in the step that has just run."""
        if self._shares_tokens:
            self._sampled.append(request)

    def launch(self, scheduled: Mapping[Request, int]) -> StepPlan:
        """Return the plan of a step, which is in flight until collected if it computes anything."""
        plan = StepPlan(step_id=self._step_id, freed_rows=self.freed_rows)
        self._step_id += 1
        for request in self._sampled:
            if request.row is not None:  # rows that have ended since are left out
                at = len(request.token_ids) - 1
                token_ids = request.token_ids[at:]
                plan.new_tokens.append(RowTokens(row=request.row, position=at, token_ids=token_ids))
        self._sampled, self.freed_rows = [], []
        # Tokens come back in this order.
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
        """Return the origins of all requests in flight, for the record that outlives the rank."""
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
        """Prove that rows are used once and counts are those of the steps in flight.

        ``owners``: the living requests and the ended ones.
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
        # After the last known token the step draws one. Tokens in flight count as known, because
        # the device looks them up.
        start, samples = request.num_scheduled, num_tokens == request.num_to_schedule
        plan.scheduled.append(
            ScheduledRow(row=row, num_computed_tokens=start, num_tokens=num_tokens, sample=samples)
        )
        request.num_in_flight += num_tokens
        request.num_unknown += samples
