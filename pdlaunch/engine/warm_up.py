"""Steps that a rank runs before its first request.

They initialise lazily what the first request would else pay for, and tell what steps cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.engine.step_costs import work_of
from pdlaunch.protocol.costs import StepWork
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId

Measurement = tuple[StepWork, float]
"""The work of a step and the seconds that it took."""

_NUM_STREAMS = {"cpu": 8, "cuda": 32}
_NUM_REPEATS = {"cpu": 1, "cuda": 3}
_FEW_BLOCKS = 2
"""Blocks of a short prompt."""
_FEWEST_TOKENS = 2
"""A prompt of so few takes beside streams what launching the kernels takes, on a GPU. On a CPU
nothing is launched.
"""


class WarmUp:
    """Runs the steps; they use the first rows and blocks, which nobody else has yet.

    ``execute`` runs one step and waits for it. All ranks of a TP group run the same ones.
    """

    def __init__(
        self,
        execute: Callable[[StepPlan], object],
        spec: EngineSpec,
        *,
        num_groups: int,
        num_blocks: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._execute = execute
        self._spec = spec
        self._num_groups = num_groups
        self._clock = clock
        blocks_per_group = num_blocks // num_groups
        self._num_short = min(_FEW_BLOCKS * spec.block_size, self._longest(blocks_per_group))
        self._num_long = self._longest(blocks_per_group)
        self._max_streams = min(
            _NUM_STREAMS[spec.device], spec.max_num_seqs, blocks_per_group // (_FEW_BLOCKS + 1)
        )
        self._rows: list[int] = []
        self.num_used_blocks = 0

    def run(self) -> list[Measurement]:
        """Return what was measured; nothing where not even a short prompt has room."""
        if self._num_short < 1:
            return []
        # The first time pays for what is initialised lazily, for each size of a batch anew; of the
        # others the fastest counts, as nothing makes a step faster than it is.
        self._measure()
        repeats = [self._measure() for _ in range(_NUM_REPEATS[self._spec.device])]
        return [min(steps, key=lambda step: step[1]) for steps in zip(*repeats, strict=True)]

    def _measure(self) -> list[Measurement]:
        measured = [self._prompt(self._num_short), self._streams(1)]
        if self._max_streams > 1:
            measured.append(self._streams(self._max_streams))
            if self._spec.device == "cuda":
                measured.append(self._prompt_beside_streams())
        return measured + [self._prompt(num_tokens) for num_tokens in self._longer_prompts()]

    def _longest(self, blocks_per_group: int) -> int:
        spec = self._spec
        fits = blocks_per_group * spec.block_size - 1
        return min(spec.max_num_batched_tokens, spec.max_model_len - 1, fits)

    def _longer_prompts(self) -> Sequence[int]:
        """Return lengths for which a device takes some milliseconds; a CPU would take too long."""
        longest = self._num_long
        wanted = () if self._spec.device == "cpu" else (longest // 8, longest // 4, longest // 2)
        return [number for number in wanted if self._num_short < number <= longest]

    def _prompt(self, num_tokens: int) -> Measurement:
        plan = self._plan(1, num_tokens)
        plan.scheduled = [
            ScheduledRow(row=0, num_computed_tokens=0, num_tokens=num_tokens, sample=False)
        ]
        return self._time(plan)

    def _streams(self, num_streams: int) -> Measurement:
        plan = self._plan(num_streams, self._num_short)
        plan.scheduled = self._next_tokens(num_streams)
        return self._time(plan)

    def _prompt_beside_streams(self) -> Measurement:
        plan = self._plan(self._max_streams, self._num_short)
        last, num_tokens = self._max_streams - 1, min(_FEWEST_TOKENS, self._num_short)
        plan.scheduled = [
            *self._next_tokens(last),
            ScheduledRow(row=last, num_computed_tokens=0, num_tokens=num_tokens, sample=False),
        ]
        return self._time(plan)

    def _next_tokens(self, num_streams: int) -> list[ScheduledRow]:
        return [
            ScheduledRow(row=row, num_computed_tokens=self._num_short, num_tokens=1, sample=True)
            for row in range(num_streams)
        ]

    def _time(self, plan: StepPlan) -> Measurement:
        begin_at = self._clock()
        self._execute(plan)
        return work_of(plan), self._clock() - begin_at

    def _plan(self, num_rows: int, num_tokens: int) -> StepPlan:
        """Return a plan whose rows have ``num_tokens`` tokens, and one that is known to follow."""
        blocks_per_group = -(-(num_tokens + 1) // self._spec.block_size)
        blocks_per_row = blocks_per_group * self._num_groups
        self.num_used_blocks = max(self.num_used_blocks, num_rows * blocks_per_row)
        freed, self._rows = self._rows, [*range(num_rows)]
        return StepPlan(
            step_id=-1,
            freed_rows=freed,
            new_rows=[
                NewRow(
                    row=row,
                    request_id=RequestId(f"warm-up-{row}"),
                    token_ids=[0] * (num_tokens + 1),
                    num_prompt_tokens=num_tokens + 1,
                    sampling=SamplingParams(max_tokens=1, temperature=0.0),
                )
                for row in self._rows
            ],
            # Rows take blocks one after the other, groups within a row in turns: of G groups,
            # group g has g, g + G, g + 2 * G, ..
            new_blocks=[
                NewBlocks(
                    row=row,
                    group=group,
                    first_block_index=0,
                    block_ids=[
                        *range(
                            row * blocks_per_row + group,
                            (row + 1) * blocks_per_row,
                            self._num_groups,
                        )
                    ],
                )
                for row in self._rows
                for group in range(self._num_groups)
            ],
        )
