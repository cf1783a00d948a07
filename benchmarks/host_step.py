"""Time what rank 0 does on the CPU for one decode step, with no model: ``python -m
benchmarks.host_step --batch-size 128``.

This is what a GPU waits for between two steps unless the engine runs ahead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.rows import RowTable
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.engine import AddRequest, Outputs, SamplingParams, from_rank
from pdlaunch.protocol.ids import EngineId, RequestId
from pdlaunch.protocol.kv_params import TokenOutput

BLOCK_SIZE = 16
Result = TypeVar("Result")


class HostStep:
    """Runs a scheduler with ``batch_size`` requests that decode.

    In place of a model, a runner that only keeps rows answers with token 7. ``records_spans``: as
    for requests of a router that asks what becomes of them.
    """

    def __init__(
        self, batch_size: int, context_tokens: int, num_steps: int, *, records_spans: bool = False
    ) -> None:
        length = context_tokens + num_steps + 8
        spec = EngineSpec(
            name="bench-0",
            role="decode",
            model_dir="",
            served_model_name="bench",
            dtype="float32",
            max_model_len=length,
            block_size=BLOCK_SIZE,
            enable_cumem_allocator=False,
            max_num_seqs=batch_size,
            max_num_batched_tokens=batch_size * context_tokens,
            device="cpu",
            device_indices=(),
            tensor_parallel_size=1,
            num_threads=1,
        )
        num_blocks = batch_size * (length // BLOCK_SIZE + 2)
        groups, engine_id = [KVCacheGroup((0,), None)], EngineId("bench")
        self._scheduler = Scheduler(
            RequestLifecycle(spec, groups, num_blocks, model_digest="", engine_id=engine_id, port=0)
        )
        self._rows = RowTable(spec, 1)
        self.seconds: dict[str, list[float]] = {}
        sampling = SamplingParams(max_tokens=length)
        for index in range(batch_size):
            prompt = [index + 1] + [5] * (context_tokens - 1)
            self._scheduler.requests.add(
                AddRequest(
                    request_id=RequestId(f"request-{index}/0"),
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    records_spans=records_spans,
                )
            )

    def run(self) -> None:
        """Run one step."""
        plan = self._time("schedule", self._scheduler.schedule)
        self._time("apply and pack", lambda: self._pack(plan))
        tokens: list[TokenOutput | None] = [
            TokenOutput(token_id=7) for item in plan.scheduled if item.sample
        ]
        self._time(
            "postprocess",
            lambda: self._scheduler.postprocess(plan, tokens),
        )
        self._time(
            "encode outputs",
            lambda: from_rank.encode(Outputs(items=self._scheduler.requests.take_outputs())),
        )
        for item in plan.scheduled:
            row = self._rows[item.row]
            row.append(row.num_tokens, [7])

    def _pack(self, plan: StepPlan) -> None:
        self._rows.apply(plan)
        self._rows.pack(plan.scheduled)

    def _time(self, what: str, call: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = call()
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)
        return result


def main() -> None:
    """Print the median of each part in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=300)
    arguments = parser.parse_args()
    step = HostStep(arguments.batch_size, arguments.context_tokens, arguments.num_steps)
    for _ in range(arguments.num_steps):
        step.run()
    medians = {what: statistics.median(seconds) * 1e6 for what, seconds in step.seconds.items()}
    lines = [
        f"{what:>16}  {median:7.0f} us"
        for what, median in [*medians.items(), ("together", sum(medians.values()))]
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
