"""Runs a scheduler over a ModelRunner, and makes every mistake in the use of blocks show: the KV
cache starts full of NaN, and blocks that nobody owns any more become NaN at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.protocol.engine import AddRequest, SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput

if TYPE_CHECKING:
    from pdlaunch.engine.runner import ModelRunner

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96


GRAPHS: dict[str, dict[str, object]] = {"graphs": {}, "eager": {"enforce_eager": True}}
"""Settings for steps on a GPU, by which of them run from CUDA graphs."""


def make_spec(model_dir: object, /, **changes: object) -> EngineSpec:
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


def answers(
    runner: ModelRunner,
    prompts: list[list[int]],
    num_tokens: int,
    *,
    step_tokens: int = 64,
    apart: int = 0,
    ahead: bool = False,
    share: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> list[list[int]]:
    """Greedy answers to prompts that come ``apart`` steps after each other; a step computes at most
    ``step_tokens`` tokens.

    ``ahead``: a step is launched before the one ahead of it is collected. ``share`` makes rank 0's
    tokens known to the other ranks of a TP group.
    """
    # Imported here: few of those who take a spec from this module need torch.
    from tests.engine.fake_engine import make_scheduler

    changes = {"max_num_batched_tokens": step_tokens, "enable_prefix_caching": False}
    spec = runner._spec.model_copy(update=changes)
    scheduler = make_scheduler(spec, runner.layout.groups, runner.num_blocks)
    requests, pool = scheduler.requests, scheduler.requests.kv.pool
    random.Random(step_tokens).shuffle(pool._free)
    runner.kv_cache.fill_(float("nan"))
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    arrivals = deque(
        AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)  # type: ignore[arg-type]
        for index, prompt in enumerate(prompts)
    )
    found: dict[str, list[int]] = {message.request_id: [] for message in arrivals}
    in_flight: deque = deque()

    def collect() -> None:
        plan, launched = in_flight.popleft()
        drawn = [token.token_id for token in runner.collect(launched) if token is not None]
        tokens = share(drawn) if any(item.sample for item in plan.scheduled) else []
        scheduler.postprocess(plan, [TokenOutput(token_id=token_id) for token_id in tokens])
        for item in requests.take_outputs():
            found[item.request_id] += [token.token_id for token in item.tokens]
        runner.kv_cache[pool._free] = float("nan")

    step = 0
    while arrivals or in_flight or scheduler.has_work():
        while arrivals and int(arrivals[0].request_id) * apart <= step:
            requests.add(arrivals.popleft())
        plan = scheduler.schedule_ahead() if in_flight else None
        if plan is None:
            while in_flight:
                collect()
            plan = scheduler.schedule()
        launched = runner.launch(plan)
        if plan.scheduled:
            in_flight.append((plan, launched))
        while len(in_flight) > (ahead and bool(plan.scheduled)):
            collect()
        step += 1
    return list(found.values())
