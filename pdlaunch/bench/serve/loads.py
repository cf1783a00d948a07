"""Says what a benchmark sends to a deployment, and when: random prompts, or those of a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

import msgspec

from pdlaunch.bench.serve.target import BenchTarget
from pdlaunch.bench.serve.timed_completion import Goals
from pdlaunch.bench.serve.traces import TraceRequest, prompt_tokens, tokenize
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
    """Speed of a bare transfer by prompt length, for the goal of the first gap."""
    step_ms: Mapping[int, float] = {}
    """Decode step by concurrency, for the share of what it allows."""
    request_rates: Sequence[float] = ()
    """Requests sent a second, instead of ``concurrencies``."""
    burstiness: float = 1.0
    goals: Goals = Goals()
    trace: Sequence[TraceRequest] = ()
    """Requests of a trace, instead of random prompts. It is sent at its own times if it has any and
    there are neither concurrencies nor rates.
    """
    trace_speed: float = 1.0


Planned = tuple[Callable[[], Sequence[int]], int]
"""Makes the prompt when it is sent, as those of a trace are large; and the output tokens."""


class BenchLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Says what one row sends, and when."""

    input_tokens: int
    requests: Sequence[Planned]
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


async def plan_loads(
    options: BenchOptions, target: BenchTarget, rng: random.Random
) -> list[BenchLoad]:
    """Return what each row sends. Raises PdlaunchError when it cannot fit into the context."""
    if options.trace:
        return _trace_loads(options, target, await tokenize(target, options.trace), rng)
    for input_tokens in options.input_tokens:
        target.check_length(input_tokens, options.output_tokens)
    return list(_random_loads(options, rng))


def random_prompt(rng: random.Random, max_token_id: int, num_tokens: int) -> list[int]:
    """Return random token ids, none of them special."""
    return rng.choices(range(FIRST_TOKEN_ID, max_token_id), k=num_tokens)


def _trace_loads(
    options: BenchOptions, target: BenchTarget, trace: Sequence[TraceRequest], rng: random.Random
) -> list[BenchLoad]:
    """Return one load for each concurrency or rate, or a single one at the trace's own times.

    Raises PdlaunchError when the model's context is too short for every request.
    """
    limit = target.max_model_len or math.inf
    fitting = [each for each in trace if each.num_prompt_tokens + each.output_tokens <= limit]
    if not fitting:
        raise PdlaunchError(
            f"every request of the trace is longer than max_model_len {limit}: serve the model "
            "with a larger --max-model-len if it allows it"
        )
    seed, tokens = rng.randrange(2**32), range(FIRST_TOKEN_ID, options.max_token_id)
    base = BenchLoad(
        input_tokens=round(sum(each.num_prompt_tokens for each in fitting) / len(fitting)),
        requests=[
            (partial(prompt_tokens, each, tokens, seed), each.output_tokens) for each in fitting
        ],
        num_left_out=len(trace) - len(fitting),
    )
    if options.request_rates:
        return [_at_rate(base, rate, options, rng) for rate in options.request_rates]
    times_s = [each.at_s / options.trace_speed for each in fitting if each.at_s is not None]
    if times_s and not options.concurrencies:
        return [msgspec.structs.replace(base, times_s=times_s)]
    # A trace without times of its own.
    numbers = options.concurrencies or (1,)
    return [msgspec.structs.replace(base, concurrency=number) for number in numbers]


def _random_loads(options: BenchOptions, rng: random.Random) -> Iterator[BenchLoad]:
    def load(input_tokens: int, num_requests: int) -> BenchLoad:
        prompts = [
            random_prompt(rng, options.max_token_id, input_tokens) for _ in range(num_requests)
        ]
        planned = [(partial(list[int], prompt), options.output_tokens) for prompt in prompts]
        return BenchLoad(input_tokens=input_tokens, requests=planned)

    for input_tokens in options.input_tokens:
        for rate in options.request_rates:
            yield _at_rate(load(input_tokens, options.num_requests or 32), rate, options, rng)
        for concurrency in options.concurrencies:
            number = options.num_requests or max(8, 4 * concurrency)
            yield msgspec.structs.replace(load(input_tokens, number), concurrency=concurrency)


def _at_rate(load: BenchLoad, rate: float, options: BenchOptions, rng: random.Random) -> BenchLoad:
    times_s = arrival_times(rate, options.burstiness, len(load.requests), rng)
    return msgspec.structs.replace(load, request_rate=rate, times_s=times_s)


def arrival_times(
    rate: float, burstiness: float, num_requests: int, rng: random.Random
) -> list[float]:
    """Return the seconds from the start at which requests are sent, ``rate`` a second on average.

    The pauses between them are gamma distributed of shape ``burstiness``, as vLLM's benchmark has
    them: 1 is a Poisson process, less comes in bursts, infinity comes evenly.
    """
    if math.isinf(burstiness):
        pauses = [1 / rate] * (num_requests - 1)
    else:
        scale = 1 / (rate * burstiness)
        pauses = [rng.gammavariate(burstiness, scale) for _ in range(num_requests - 1)]
    return list(accumulate(pauses, initial=0.0))
