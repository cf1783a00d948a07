"""Drives a running deployment through its public API and measures what a client sees (``pdlaunch
bench serve``).

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence

from pdlaunch.bench.serve.loads import BenchLoad, BenchOptions, Planned, plan_loads, random_prompt
from pdlaunch.bench.serve.rows import BenchRun, summarise
from pdlaunch.bench.serve.target import BenchTarget, Counters, open_target, total
from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete
from pdlaunch.errors import PdlaunchError

ProgressText = Callable[[str], None]


class BenchProgress:
    """Counts requests; says after each how many there are and how long the rest will take."""

    def __init__(
        self, total: int, show: ProgressText, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._start_at = clock()
        self._num_done = 0
        self._label = ""

    def begin(self, label: str) -> None:
        """Name what is measured from now on."""
        if not self._num_done:
            self._start_at = self._clock()
        self._label = label
        self._show(label)

    def one_done(self) -> None:
        """Count a request that has ended, well or not."""
        self._num_done += 1
        took_s = self._clock() - self._start_at
        left_s = took_s / self._num_done * (self._total - self._num_done)
        done = f"{self._num_done} of {self._total} requests"
        self._show(f"{self._label}; {done}, about {left_s:.0f} s left")


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
    """Send one request. Raises PdlaunchError with what the deployment has against it."""
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
        make_prompt, output_tokens = planned
        done.append(await complete(target.session, target.model, make_prompt(), output_tokens))
        steps.one_done()

    async def work() -> None:
        for planned in waiting:
            await send(planned)

    before, waiting = await target.counters(), iter(load.requests)
    start_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            # Each that ends makes room for the next.
            for _ in range(load.concurrency):
                group.create_task(work())
        else:
            for at_s, planned in zip(load.times_s, load.requests, strict=True):
                await asyncio.sleep(max(0.0, start_at + at_s - time.perf_counter()))
                group.create_task(send(planned))
    seconds = time.perf_counter() - start_at
    num_pulls = sum(each.error is None and each.num_tokens > 1 for each in done)

    def is_complete(counted: Counters) -> bool:
        pulls = total(counted, "kv_transfers")
        return pulls is None or pulls >= num_pulls

    row = summarise(
        load.input_tokens,
        load.concurrency,
        done,
        seconds,
        await target.counted_since(before, is_complete),
        bare_gb_per_s=options.bare_gb_per_s.get(load.input_tokens),
        step_ms=options.step_ms.get(load.concurrency or 0),
        goals=options.goals,
        request_rate=load.request_rate,
        burstiness=None if load.request_rate is None else options.burstiness,
        num_left_out=load.num_left_out,
    )
    return BenchRun(row=row, done=done, model=target.model)
