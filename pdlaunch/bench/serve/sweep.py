"""Drives a running deployment through its public API and measures what a client sees (``pdlaunch
bench serve``).

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from pdlaunch.bench.serve.engine_counters import EngineCounters, counters_when, read_counters
from pdlaunch.bench.serve.row import BenchRow, summarise
from pdlaunch.bench.serve.target import BenchTarget, open_target
from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete
from pdlaunch.errors import PdlaunchError

FIRST_TOKEN_ID = 100
"""Lowest token id of a prompt: prompts keep away from special tokens."""

ProgressText = Callable[[str], None]


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sets what one benchmark sends to a deployment."""

    url: str = ""
    api_key: str | None = None
    input_tokens: Sequence[int] = (128,)
    output_tokens: int = 32
    concurrencies: Sequence[int] = (1, 4, 16)
    num_requests: int | None = None
    """Requests for each length and concurrency; None: four rounds, at least eight."""
    max_token_id: int = 30_000
    """Prompts are drawn from [FIRST_TOKEN_ID, max_token_id)."""
    seed: int | None = None
    request_timeout_s: float = 600.0
    bare_gb_per_s: Mapping[int, float] = {}
    """Figures of ``bench transfer`` by prompt length, for the goal of the first gap."""
    step_ms: Mapping[int, float] = {}
    """Figures of ``bench step`` by concurrency, for the share of what it allows."""


async def bench_serve(options: BenchOptions, progress: ProgressText) -> AsyncIterator[BenchRow]:
    """Measure every length at every concurrency in turn, after one warm-up request a length.

    Raises PdlaunchError when the deployment cannot be used, or refuses a warm-up request.
    """
    async with open_target(options.url, options.api_key, options.request_timeout_s) as target:
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        for input_tokens in options.input_tokens:
            target.check_length(input_tokens, options.output_tokens)
        for input_tokens in options.input_tokens:
            progress(f"warming up with a prompt of {input_tokens} tokens")
            await warm_up(
                target,
                random_prompt(rng, options.max_token_id, input_tokens),
                options.output_tokens,
            )
        for input_tokens in options.input_tokens:
            for concurrency in options.concurrencies:
                progress(f"prompts of {input_tokens} tokens, {concurrency} at once")
                yield await _run(target, options, input_tokens, concurrency, rng)


async def warm_up(target: BenchTarget, prompt: Sequence[int], output_tokens: int) -> None:
    """Send one request.

    Raises PdlaunchError with what the deployment has against it.
    """
    error = (await complete(target.session, target.model, prompt, output_tokens)).error
    if error is not None:
        raise PdlaunchError(
            f"the deployment does not take a request of {len(prompt)} prompt tokens: {error}"
        )


def random_prompt(rng: random.Random, max_token_id: int, num_tokens: int) -> list[int]:
    """Return random token ids, none of them special."""
    return rng.choices(range(FIRST_TOKEN_ID, max_token_id), k=num_tokens)


async def _run(
    target: BenchTarget,
    options: BenchOptions,
    input_tokens: int,
    concurrency: int,
    rng: random.Random,
) -> BenchRow:
    num_requests = options.num_requests or max(8, 4 * concurrency)
    prompts = [random_prompt(rng, options.max_token_id, input_tokens) for _ in range(num_requests)]
    done: list[TimedCompletion] = []

    async def worker() -> None:
        while prompts:
            done.append(
                await complete(target.session, target.model, prompts.pop(), options.output_tokens)
            )

    before = await read_counters(target.session)
    start_at = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - start_at
    return summarise(
        input_tokens,
        concurrency,
        done,
        seconds,
        await _counted(target, before, done),
        bare_gb_per_s=options.bare_gb_per_s.get(input_tokens),
        step_ms=options.step_ms.get(concurrency),
    )


async def _counted(
    target: BenchTarget, before: EngineCounters, done: Sequence[TimedCompletion]
) -> EngineCounters:
    """Return what engines counted since ``before``; a request of several tokens needs one pull."""
    num_pulls = sum(completion.error is None and completion.num_tokens > 1 for completion in done)

    def is_complete(counters: EngineCounters) -> bool:
        pulls = counters.since(before).total("kv_transfers")
        return pulls is None or pulls >= num_pulls

    return (await counters_when(target.session, is_complete)).since(before)
