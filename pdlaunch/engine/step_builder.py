"""Rows of the batch and plans of steps, which tell ranks only what they do not know yet."""

from __future__ import annotations

from pdlaunch.engine.offload.jobs import OffloadJob
from pdlaunch.engine.request import Request
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.protocol.transfer import TransferCommand


class StepDraft:
    """Collects what the next step computes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that may still be added."""
        self.prompt_budget = budget
        """Tokens of prompts that may still be added, within ``budget``."""
        self.scheduled: dict[Request, int] = {}
        self.preempted = False

    def room(self, num_wanted: int) -> int:
        """Return how many of the next tokens of a request may be added; more than one: a prompt."""
        budget = min(self.budget, self.prompt_budget) if num_wanted > 1 else self.budget
        return max(0, min(num_wanted, budget))

    def add(self, request: Request, num_tokens: int) -> None:
        self.scheduled[request] = num_tokens
        self.budget -= num_tokens
        if num_tokens > 1:
            self.prompt_budget -= num_tokens

    def remove(self, request: Request) -> None:
        self.budget += self.scheduled.pop(request, 0)


class StepBuilder:
    """Seats requests on rows and remembers what the ranks have been told of each.

    Rows are 0 <= row < ``max_num_seqs``. Sampled tokens are sent only when there are ranks
    (``tp_size`` > 1) that did not sample them.
    """

    def __init__(self, max_num_seqs: int, tp_size: int) -> None:
        self._seated: list[Request | None] = [None] * max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._shares_tokens = tp_size > 1
        self._sampled: list[Request] = []
        self._step_id = 0

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def has_freed_rows(self) -> bool:
        """Return whether the ranks have yet to be told of rows that ended."""
        return bool(self._freed_rows)

    def seat(self, request: Request) -> None:
        """Give the request a row."""
        request.row = self._free_rows.pop()
        self._seated[request.row] = request

    def unseat(self, request: Request) -> None:
        """Take the request's row back.

        The ranks hear of it in the next plan, before they hear of the row's next request.
        """
        assert request.row is not None
        self._seated[request.row] = None
        self._free_rows.append(request.row)
        # Ranks that have never heard of the row have nothing to free.
        if request.num_sent_blocks is not None:
            self._freed_rows.append(request.row)
        request.row = request.num_sent_blocks = None

    def request_at(self, row: int) -> Request | None:
        return self._seated[row]

    def add_sampled(self, request: Request) -> None:
        """Note that rank 0 has sampled the request's last token in the step that has just run."""
        if self._shares_tokens:
            self._sampled.append(request)

    def build(
        self, scheduled: dict[Request, int], commands: list[TransferCommand], jobs: list[OffloadJob]
    ) -> StepPlan:
        """Return the plan in which each request computes its number of tokens."""
        plan = StepPlan(
            step_id=self._step_id,
            freed_rows=self._freed_rows,
            new_tokens=self._new_tokens(),
            commands=commands,
            jobs=jobs,
        )
        self._step_id += 1
        self._freed_rows = []
        for request, num_tokens in scheduled.items():
            row, start = request.row, request.num_scheduled
            assert row is not None
            if request.num_sent_blocks is None:
                plan.new_rows.append(_new_row(request, row))
                request.num_sent_blocks = 0
            if request.num_sent_blocks < request.tables.end:
                _add_blocks(plan, request, row, request.num_sent_blocks)
                request.num_sent_blocks = request.tables.end
            plan.scheduled.append(
                ScheduledRow(
                    row=row,
                    num_computed_tokens=start,
                    num_tokens=num_tokens,
                    # The last known token: what follows it is drawn. Tokens in flight count as
                    # known, as the device looks them up.
                    sample=start + num_tokens == len(request.token_ids) + request.num_unknown,
                )
            )
        return plan

    def _new_tokens(self) -> list[RowTokens]:
        """Return the tokens of the last step, without those of rows that have ended since."""
        sampled, self._sampled = self._sampled, []
        return [
            RowTokens(
                row=request.row,
                position=len(request.token_ids) - 1,
                token_ids=request.token_ids[-1:],
            )
            for request in sampled
            if request.row is not None
        ]


def _new_row(request: Request, row: int) -> NewRow:
    return NewRow(
        row=row,
        request_id=request.request_id,
        token_ids=request.token_ids.copy(),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=request.message.sampling,
    )


def _add_blocks(plan: StepPlan, request: Request, row: int, start: int) -> None:
    tables = request.tables
    for group, first in enumerate(tables.first):
        begin = max(start, first)
        if block_ids := tables.between(group, begin, tables.end):
            plan.new_blocks.append(
                NewBlocks(row=row, group=group, first_block_index=begin, block_ids=block_ids)
            )
