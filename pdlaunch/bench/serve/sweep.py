"""Drives a running deployment through its public API and measures what a client sees (``pdlaunch
bench serve``).

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from pdlaunch.bench.serve.engine_counters import EngineCounters, counters_when, read_counters
from pdlaunch.bench.serve.loads import BenchLoad, BenchOptions, Planned, plan_loads, random_prompt
from pdlaunch.bench.serve.progress import BenchProgress, ProgressText
from pdlaunch.bench.serve.row import BenchRun, summarise
from pdlaunch.bench.serve.target import BenchTarget, open_target
from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete
from pdlaunch.errors import PdlaunchError


async def bench_serve(options: BenchOptions, progress: ProgressText) -> AsyncIterator[BenchRun]:
    """Measure every length at every concurrency, or rate, in turn, or a trace, after one warm-up
    request a length.

    Raises PdlaunchError when the deployment cannot be used, or refuses a warm-up request.
    """
    async with open_target(options.url, options.api_key, options.request_timeout_s) as target:
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        loads = await plan_loads(options, target, rng)
        for input_tokens in dict.fromkeys(load.input_tokens for load in loads):
            progress(f"warming up with a prompt of {input_tokens} tokens")
            prompt = random_prompt(rng, options.max_token_id, input_tokens)
            await warm_up(target, prompt, 2 if options.trace else options.output_tokens)
        steps = BenchProgress(sum(len(load.requests) for load in loads), progress)
        for load in loads:
            steps.begin(load.label)
            yield await _run(target, options, load, steps)


async def warm_up(target: BenchTarget, prompt: Sequence[int], output_tokens: int) -> None:
    """Send one request.

    Raises PdlaunchError with what the deployment has against it.
    """
    error = (await complete(target.session, target.model, prompt, output_tokens)).error
    if error is not None:
        raise PdlaunchError(
            f"the deployment does not take a request of {len(prompt)} prompt tokens: {error}"
        )


async def _run(
    target: BenchTarget, options: BenchOptions, load: BenchLoad, steps: BenchProgress
) -> BenchRun:
    done: list[TimedCompletion] = []

    async def send(planned: Planned) -> None:
        prompt = planned.make_prompt()
        done.append(await complete(target.session, target.model, prompt, planned.output_tokens))
        steps.one_done()

    before = await read_counters(target.session)
    start_at = time.perf_counter()
    if load.concurrency is not None:
        await _send_by_turns(load.requests, load.concurrency, send)
    else:
        await _send_at(load.times_s, load.requests, send)
    seconds = time.perf_counter() - start_at
    row = summarise(
        load.input_tokens,
        load.concurrency,
        done,
        seconds,
        await _counted(target, before, done),
        bare_gb_per_s=options.bare_gb_per_s.get(load.input_tokens),
        step_ms=None if load.concurrency is None else options.step_ms.get(load.concurrency),
        goals=options.goals,
        request_rate=load.request_rate,
        burstiness=None if load.request_rate is None else options.burstiness,
        num_left_out=load.num_left_out,
    )
    return BenchRun(row=row, done=done, start_at=start_at, model=target.model)


async def _send_by_turns(
    requests: Sequence[Planned], concurrency: int, send: Callable[[Planned], Awaitable[None]]
) -> None:
    """Send so many at a time; each that ends makes room for the next."""
    waiting = iter(requests)

    async def worker() -> None:
        for planned in waiting:
            await send(planned)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _send_at(
    times_s: Sequence[float],
    requests: Sequence[Planned],
    send: Callable[[Planned], Coroutine[Any, Any, None]],
) -> None:
    """Send each at its time, however many are open."""
    loop = asyncio.get_running_loop()
    start_at = loop.time()
    async with asyncio.TaskGroup() as group:
        for at_s, planned in zip(times_s, requests, strict=True):
            await asyncio.sleep(max(0.0, start_at + at_s - loop.time()))
            group.create_task(send(planned))


async def _counted(
    target: BenchTarget, before: EngineCounters, done: Sequence[TimedCompletion]
) -> EngineCounters:
    """Return what engines counted since ``before``; a request of several tokens needs one pull."""
    num_pulls = sum(completion.error is None and completion.num_tokens > 1 for completion in done)

    def is_complete(counters: EngineCounters) -> bool:
        pulls = counters.since(before).total("kv_transfers")
        return pulls is None or pulls >= num_pulls

    return (await counters_when(target.session, is_complete)).since(before)
