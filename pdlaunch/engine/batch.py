"""Seats requests on rows, makes the plans of steps, and remembers the steps in flight.

    step N     launch ──────────── collect, postprocess
    step N+1                launch ──────────────────── collect, postprocess

Plans hold only what ranks do not know yet. A request that ends while a step computes it keeps
its row and its blocks until the last such step has been collected: the step still writes to them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

from pdlaunch.engine.offload.jobs import OffloadJob
from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.protocol.process.step_record import SUSPECT_BIT
from pdlaunch.protocol.transfer import TransferCommand


class Batch:
    """Owns the rows 0 <= row < ``max_num_seqs``. Other ranks are sent sampled tokens."""

    def __init__(self, max_num_seqs: int, tp_size: int) -> None:
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._shares_tokens = tp_size > 1
        self._sampled: list[Request] = []
        self._step_id = 0
        self._steps: deque[tuple[StepPlan, list[Request]]] = deque()

    @property
    def num_steps_in_flight(self) -> int:
        """Return how many plans with something to compute are not collected: at most two."""
        return len(self._steps)

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def has_freed_rows(self) -> bool:
        """Return whether the ranks have yet to be told of rows that ended."""
        return bool(self._freed_rows)

    def seat(self, request: Request) -> None:
        """Give the request a row."""
        request.row = self._free_rows.pop()

    def unseat(self, request: Request) -> None:
        """Take the request's row back; the ranks hear of it in the next plan, before new rows."""
        assert request.row is not None
        self._free_rows.append(request.row)
        # Ranks that have never heard of the row have nothing to free.
        if request.num_sent_blocks is not None:
            self._freed_rows.append(request.row)
        request.row = request.num_sent_blocks = None

    def add_sampled(self, request: Request) -> None:
        """Note that rank 0 has sampled the request's last token in the step that has just run."""
        if self._shares_tokens:
            self._sampled.append(request)

    def launch(
        self,
        scheduled: Mapping[Request, int],
        commands: list[TransferCommand],
        jobs: list[OffloadJob],
    ) -> StepPlan:
        """Return the plan of a step, which is in flight until collected if it computes anything."""
        sampled, self._sampled = self._sampled, []
        freed, self._freed_rows = self._freed_rows, []
        plan = StepPlan(
            step_id=self._step_id,
            freed_rows=freed,
            # Leave out rows that have ended since.
            new_tokens=[
                RowTokens(
                    row=request.row,
                    position=len(request.token_ids) - 1,
                    token_ids=request.token_ids[-1:],
                )
                for request in sampled
                if request.row is not None
            ],
            commands=commands,
            jobs=jobs,
        )
        self._step_id += 1
        for request, num_tokens in scheduled.items():
            self._add(plan, request, num_tokens)
        if plan.scheduled:
            self._steps.append((plan, [*scheduled]))
        return plan

    def collect(self, plan: StepPlan) -> Iterator[tuple[ScheduledRow, Request]]:
        """Remove the oldest step from all counts; yield its rows and their requests."""
        if not plan.scheduled:
            return
        oldest, requests = self._steps.popleft()
        assert oldest is plan
        for item, request in zip(plan.scheduled, requests, strict=True):
            request.num_in_flight -= item.num_tokens
            request.num_unknown -= item.sample
            yield item, request

    def marks(self) -> list[int]:
        """Return the origins of all requests in flight, for the record that outlives the rank."""
        return [
            request.message.origin | (SUSPECT_BIT if request.is_suspect else 0)
            for _, requests in self._steps
            for request in requests
        ]

    def ended(self) -> set[Request]:
        """Return the requests that have ended and still own a row and blocks."""
        return {
            request
            for _, requests in self._steps
            for request in requests
            if request.phase is Phase.FINISHED
        }

    def check_integrity(self, living: set[Request]) -> None:
        """Prove that rows are used once and counts are those of the steps in flight."""
        in_flight: Counter[Request] = Counter()
        unknown: Counter[Request] = Counter()
        for plan, requests in self._steps:
            for item, request in zip(plan.scheduled, requests, strict=True):
                in_flight[request] += item.num_tokens
                unknown[request] += item.sample
        owners = living | self.ended()
        assert in_flight.keys() <= owners
        for request in owners:
            assert request.num_in_flight == in_flight[request]
            assert request.num_unknown == unknown[request]
            assert not request.num_in_flight or request.row is not None
        rows = [request.row for request in owners if request.row is not None]
        assert len({*rows, *self._free_rows}) == len(rows) + len(self._free_rows)

    def _add(self, plan: StepPlan, request: Request, num_tokens: int) -> None:
        row, start, tables = request.row, request.num_scheduled, request.tables
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
                if block_ids := tables.between(group, begin, tables.end):
                    plan.new_blocks.append(
                        NewBlocks(
                            row=row, group=group, first_block_index=begin, block_ids=block_ids
                        )
                    )
            request.num_sent_blocks = tables.end
        # After the last known token the step draws one. Tokens in flight count as known, because
        # the device looks them up.
        samples = num_tokens == request.num_to_schedule
        plan.scheduled.append(
            ScheduledRow(row=row, num_computed_tokens=start, num_tokens=num_tokens, sample=samples)
        )
        request.num_in_flight += num_tokens
        request.num_unknown += samples
        if request.spans.wants_steps:
            request.spans.launched()
