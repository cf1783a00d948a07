"""Steps that a rank runs before its first request, so that this pays for no lazy initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId

_NUM_STREAMS = {"cpu": 8, "cuda": 32}


def warm_up_steps(spec: EngineSpec, *, num_groups: int, num_blocks: int) -> Iterator[StepPlan]:
    """Yield the plans of a short prompt, of decode steps, and on a GPU of the longest prompt and
    of a chunk with something before it.

    They use the first rows and blocks. There are none where not even a short prompt has room. All
    ranks of a TP group run the same ones.
    """
    blocks_per_group = num_blocks // num_groups
    fits = blocks_per_group * spec.block_size - 1
    longest = min(spec.max_num_batched_tokens, spec.max_model_len - 1, fits)
    short = min(2 * spec.block_size, longest)
    if short < 1:
        return
    num_streams = min(_NUM_STREAMS[spec.device], spec.max_num_seqs, blocks_per_group // 3)
    # The number of rows, and for each of them the tokens before this step and in it.
    steps = [(1, 0, short), (1, short, 1), (max(1, num_streams), short, 1)]
    if spec.device == "cuda":
        steps.append((1, 0, longest))
        if 2 * short <= longest:
            steps.append((1, short, short))
    num_rows_before = 0
    for num_rows, num_before, num_tokens in steps:
        yield _plan(spec.block_size, num_groups, num_rows, num_before, num_tokens, num_rows_before)
        num_rows_before = num_rows


def _plan(
    block_size: int,
    num_groups: int,
    num_rows: int,
    num_before: int,
    num_tokens: int,
    num_rows_before: int,
) -> StepPlan:
    # One more token is known to follow, so that nothing is drawn for prompts.
    known = num_before + num_tokens + (num_before == 0)
    blocks_per_group = -(-known // block_size)
    blocks_per_row = blocks_per_group * num_groups
    return StepPlan(
        step_id=-1,
        freed_rows=[*range(num_rows_before)],
        new_rows=[
            NewRow(
                row=row,
                request_id=RequestId(f"warm-up-{row}"),
                token_ids=[0] * known,
                num_prompt_tokens=known,
                sampling=SamplingParams(max_tokens=1, temperature=0.0),
            )
            for row in range(num_rows)
        ],
        # Rows take blocks one after the other, groups within a row in turns: of G groups, group g
        # has g, g + G, g + 2 * G, ..
        new_blocks=[
            NewBlocks(
                row=row,
                group=group,
                first_block_index=0,
                block_ids=[
                    *range(row * blocks_per_row + group, (row + 1) * blocks_per_row, num_groups)
                ],
            )
            for row in range(num_rows)
            for group in range(num_groups)
        ],
        scheduled=[
            ScheduledRow(
                row=row,
                num_computed_tokens=num_before,
                num_tokens=num_tokens,
                sample=num_before > 0,
            )
            for row in range(num_rows)
        ],
    )
