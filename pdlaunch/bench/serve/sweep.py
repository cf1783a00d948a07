"""Drives a running deployment through its public API and measures what a client sees (``pdlaunch
bench serve``).

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Any

import msgspec

from pdlaunch.bench.serve.arrivals import arrival_times
from pdlaunch.bench.serve.engine_counters import EngineCounters, counters_when, read_counters
from pdlaunch.bench.serve.goals import Goals
from pdlaunch.bench.serve.progress import Progress, ProgressText
from pdlaunch.bench.serve.row import BenchRow, summarise
from pdlaunch.bench.serve.target import BenchTarget, open_target
from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete
from pdlaunch.bench.serve.traces import (
    TraceRequest,
    num_prompt_tokens,
    output_of,
    prompt_tokens,
    tokenize,
)
from pdlaunch.errors import PdlaunchError

FIRST_TOKEN_ID = 100
"""Lowest token id of a prompt: prompts keep away from special tokens."""


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
    request_rates: Sequence[float] = ()
    """Requests sent a second, instead of ``concurrencies``."""
    burstiness: float = 1.0
    goals: Goals = Goals()
    trace: Sequence[TraceRequest] = ()
    """Requests of a trace, instead of random prompts. It is sent at its own times if it has any and
    there are neither concurrencies nor rates.
    """
    trace_speed: float = 1.0


class BenchRun(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one row, and the requests that it sums up."""

    row: BenchRow
    done: list[TimedCompletion]
    start_at: float
    """Instant at which the first request was sent, on the clock of ``done``."""
    model: str


class _Planned(msgspec.Struct, frozen=True):
    """One request to send: its prompt is made when it is sent, as those of a trace are large."""

    make_prompt: Callable[[], Sequence[int]]
    output_tokens: int


class _Load(msgspec.Struct, frozen=True, kw_only=True):
    """Says what one row sends, and when."""

    input_tokens: int
    requests: Sequence[_Planned]
    concurrency: int | None = None
    request_rate: float | None = None
    times_s: Sequence[float] = ()
    """Seconds from the start at which the requests are sent, without a ``concurrency``."""
    num_left_out: int = 0

    @property
    def label(self) -> str:
        if self.concurrency is not None:
            return f"prompts of {self.input_tokens} tokens, {self.concurrency} at once"
        if self.request_rate is not None:
            return f"prompts of {self.input_tokens} tokens, {self.request_rate:g} a second"
        return "requests as in the trace"


async def bench_serve(options: BenchOptions, progress: ProgressText) -> AsyncIterator[BenchRun]:
    """Measure every length at every concurrency, or rate, in turn, or a trace, after one warm-up
    request a length.

    Raises PdlaunchError when the deployment cannot be used, or refuses a warm-up request.
    """
    async with open_target(options.url, options.api_key, options.request_timeout_s) as target:
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        if options.trace:
            progress("reading the trace")
            loads = _trace_loads(options, await _fitting(target, options.trace), rng)
        else:
            for input_tokens in options.input_tokens:
                target.check_length(input_tokens, options.output_tokens)
            loads = list(_random_loads(options, rng))
        for input_tokens in dict.fromkeys(load.input_tokens for load in loads):
            progress(f"warming up with a prompt of {input_tokens} tokens")
            prompt = random_prompt(rng, options.max_token_id, input_tokens)
            await warm_up(target, prompt, 2 if options.trace else options.output_tokens)
        steps = Progress(sum(len(load.requests) for load in loads), progress)
        for load in loads:
            steps.begin(load.label)
            yield await _run(target, options, load, steps)


async def _fitting(target: BenchTarget, trace: Sequence[TraceRequest]) -> Sequence[TraceRequest]:
    """Return the requests for which the model's context is long enough.

    Raises PdlaunchError when there is none.
    """
    found = await tokenize(target, trace)
    limit = target.max_model_len
    fitting = [
        item
        for item in found
        if limit is None or num_prompt_tokens(item) + output_of(item) <= limit
    ]
    if not fitting:
        raise PdlaunchError(
            f"every request of the trace is longer than max_model_len {limit}: serve the model "
            "with a larger --max-model-len if it allows it"
        )
    return fitting


def _trace_loads(
    options: BenchOptions, trace: Sequence[TraceRequest], rng: random.Random
) -> list[_Load]:
    """Return one load for each concurrency or rate, or a single one at the trace's own times."""
    seed = rng.randrange(2**32)
    tokens = range(FIRST_TOKEN_ID, options.max_token_id)
    planned = [
        _Planned(partial(prompt_tokens, item, tokens, seed), output_of(item)) for item in trace
    ]
    mean = round(sum(map(num_prompt_tokens, trace)) / len(trace))
    base = _Load(
        input_tokens=mean, requests=planned, num_left_out=len(options.trace) - len(planned)
    )
    replace = msgspec.structs.replace
    if options.request_rates:
        return [_at_rate(base, rate, options, rng) for rate in options.request_rates]
    times_s = [item.at_s / options.trace_speed for item in trace if item.at_s is not None]
    if times_s and not options.concurrencies:
        return [replace(base, times_s=times_s)]
    # A trace without times of its own.
    numbers = options.concurrencies or (1,)
    return [replace(base, concurrency=number) for number in numbers]


def _random_loads(options: BenchOptions, rng: random.Random) -> Iterator[_Load]:
    for input_tokens in options.input_tokens:
        for rate in options.request_rates:
            load = _random_load(options, rng, input_tokens, options.num_requests or 32)
            yield _at_rate(load, rate, options, rng)
        for concurrency in options.concurrencies:
            number = options.num_requests or max(8, 4 * concurrency)
            load = _random_load(options, rng, input_tokens, number)
            yield msgspec.structs.replace(load, concurrency=concurrency)


def _random_load(
    options: BenchOptions, rng: random.Random, input_tokens: int, num_requests: int
) -> _Load:
    def plan() -> _Planned:
        prompt = random_prompt(rng, options.max_token_id, input_tokens)
        return _Planned(lambda: prompt, options.output_tokens)

    return _Load(input_tokens=input_tokens, requests=[plan() for _ in range(num_requests)])


def _at_rate(load: _Load, rate: float, options: BenchOptions, rng: random.Random) -> _Load:
    times_s = arrival_times(rate, options.burstiness, len(load.requests), rng)
    return msgspec.structs.replace(load, request_rate=rate, times_s=times_s)


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
    target: BenchTarget, options: BenchOptions, load: _Load, steps: Progress
) -> BenchRun:
    done: list[TimedCompletion] = []

    async def send(planned: _Planned) -> None:
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
    requests: Sequence[_Planned], concurrency: int, send: Callable[[_Planned], Awaitable[None]]
) -> None:
    """Send so many at a time; each that ends makes room for the next."""
    waiting = iter(requests)

    async def worker() -> None:
        for planned in waiting:
            await send(planned)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _send_at(
    times_s: Sequence[float],
    requests: Sequence[_Planned],
    send: Callable[[_Planned], Coroutine[Any, Any, None]],
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
