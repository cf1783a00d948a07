"""Builds StepPlans for a ModelRunner by hand, and makes every mistake in the use of blocks show.

The KV cache starts full of NaN; blocks that have left a window are filled with NaN and given to
others at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.protocol.engine import SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96


GRAPHS: dict[str, dict[str, object]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
}
"""Settings for steps on a GPU, by which of them run from CUDA graphs."""


def make_spec(model_dir: object, **changes: object) -> EngineSpec:
    settings: dict[str, object] = {
        "name": "decode-0",
        "role": "decode",
        "model_dir": str(model_dir),
        "served_model_name": "tiny",
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory": 4 * 1024**2,
        "enable_cumem_allocator": False,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "device": "cpu",
        "device_indices": (),
        "tensor_parallel_size": 1,
        "num_threads": 1,
    }
    return EngineSpec.model_validate(settings | changes)


def ignore_progress(text: str, fraction: float | None) -> None:
    assert fraction is None or 0 <= fraction <= 1


@dataclass
class Request:
    prompt: list[int]
    num_tokens: int
    sampling: SamplingParams
    start_step: int
    chunk: int
    num_computed: int = 0
    output: list[int] = field(default_factory=list)
    blocks: list[dict[int, int]] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return self.prompt + self.output


class HandScheduler:
    """``share``: makes rank 0's new tokens known to the other ranks of a TP group."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        seed: int = 0,
        share: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.runner = runner
        self.share = share
        self.random = random.Random(seed)
        self.free = self.random.sample(range(runner.num_blocks), runner.num_blocks)
        runner.kv_cache.fill_(float("nan"))

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Compute all requests; each row is one request. Mixes chunks of prompts and decode rows as
        start steps say.
        """
        step, unsaid = 0, {}
        while any(len(request.output) < request.num_tokens for request in requests):
            plan = StepPlan(step_id=step)
            for row, request in enumerate(requests):
                if step == request.start_step:
                    self._admit(plan, row, request)
                if request.start_step <= step and len(request.output) < request.num_tokens:
                    self._schedule(plan, row, request)
            plan.new_tokens = [
                RowTokens(row=row, position=at, token_ids=[token])
                for row, (at, token) in unsaid.items()
            ]
            unsaid = self._execute(plan, requests)
            step += 1
        self.runner.execute(StepPlan(step_id=step, freed_rows=[*range(len(requests))]))
        return [request.output for request in requests]

    def _execute(self, plan: StepPlan, requests: list[Request]) -> dict[int, tuple[int, int]]:
        output = self.runner.execute(plan)
        sampled = [item.row for item in plan.scheduled if item.sample]
        tokens = [token.token_id for token in output if token]
        if self.share is not None:
            tokens = self.share(tokens)
        unsaid = {}
        for row, token in zip(sampled, tokens, strict=True):
            unsaid[row] = (len(requests[row].known), token)
            requests[row].output.append(token)
        for item in plan.scheduled:
            requests[item.row].num_computed += item.num_tokens
            self._release_blocks_out_of_window(requests[item.row])
        return unsaid if self.share is not None else {}

    def _admit(self, plan: StepPlan, row: int, request: Request) -> None:
        request.blocks = [{} for _ in self.runner.layout.groups]
        plan.new_rows.append(
            NewRow(
                row=row,
                request_id=f"request-{row}",
                token_ids=request.known,
                num_prompt_tokens=len(request.prompt),
                sampling=request.sampling,
            )
        )

    def _schedule(self, plan: StepPlan, row: int, request: Request) -> None:
        num_tokens = min(request.chunk, len(request.known) - request.num_computed)
        stop = request.num_computed + num_tokens
        for group, blocks in enumerate(request.blocks):
            first = request.num_computed // BLOCK_SIZE
            new = [index for index in range(first, -(-stop // BLOCK_SIZE)) if index not in blocks]
            for index in new:
                blocks[index] = self.free.pop()
            if new:
                ids = [blocks[index] for index in new]
                plan.new_blocks.append(
                    NewBlocks(row=row, group=group, first_block_index=new[0], block_ids=ids)
                )
        plan.scheduled.append(
            ScheduledRow(
                row=row,
                num_computed_tokens=request.num_computed,
                num_tokens=num_tokens,
                sample=stop == len(request.known),
            )
        )
        self.random.shuffle(plan.scheduled)

    def _release_blocks_out_of_window(self, request: Request) -> None:
        for group, blocks in zip(self.runner.layout.groups, request.blocks, strict=True):
            if group.sliding_window is None:
                continue
            first_seen = max(0, request.num_computed - group.sliding_window + 1) // BLOCK_SIZE
            for index in [index for index in blocks if index < first_seen]:
                block = blocks.pop(index)
                self.runner.kv_cache[block] = float("nan")
                self.free.append(block)


def answer_ahead(runner: ModelRunner, prompt: list[int], num_tokens: int) -> list[int]:
    """A greedy answer for which each step is launched before the one ahead of it is collected;
    empty but on rank 0.
    """
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    num_groups, num_blocks = len(runner.layout.groups), -(-(len(prompt) + num_tokens) // BLOCK_SIZE)
    new_row = NewRow(
        row=1,
        request_id="ahead",
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=sampling,
    )
    blocks = [
        NewBlocks(
            row=1,
            group=group,
            first_block_index=0,
            block_ids=[group + num_groups * index for index in range(num_blocks)],
        )
        for group in range(num_groups)
    ]
    first = ScheduledRow(row=1, num_computed_tokens=0, num_tokens=len(prompt), sample=True)
    launched = [
        runner.launch(StepPlan(step_id=0, new_rows=[new_row], new_blocks=blocks, scheduled=[first]))
    ]
    tokens: list[int] = []
    for index in range(1, num_tokens):
        start = len(prompt) + index - 1
        row = ScheduledRow(row=1, num_computed_tokens=start, num_tokens=1, sample=True)
        launched.append(runner.launch(StepPlan(step_id=index, scheduled=[row])))
        tokens += [token.token_id for token in runner.collect(launched.pop(0)) if token]
    tokens += [token.token_id for token in runner.collect(launched.pop()) if token]
    runner.execute(StepPlan(step_id=num_tokens, freed_rows=[1]))
    return tokens


def make_requests(
    prompts: list[list[int]], num_tokens: int, *, chunk: int, apart: int = 0
) -> list[Request]:
    """Greedy requests that start ``apart`` steps after each other."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    return [
        Request(prompt, num_tokens, sampling, start_step=index * apart, chunk=chunk)
        for index, prompt in enumerate(prompts)
    ]
