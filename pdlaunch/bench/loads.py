"""Plans what a benchmark sends to a deployment, and when: random prompts, or the requests of a
trace in Mooncake's format.

Source of the format: https://github.com/kvcache-ai/Mooncake (traces).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import msgspec

from pdlaunch.bench.timed_completion import Goals
from pdlaunch.errors import ConfigError, PdlaunchError

FIRST_TOKEN_ID = 100  # special tokens have lower ids
HASHED_TOKENS = 512  # tokens that one of ``hash_ids`` stands for

PlannedRequest = tuple[Callable[[], list[int]], int]
"""A function that makes the prompt when it is sent (prompts of a trace are large), and the number
of output tokens."""


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of a trace. Equal ``hash_ids`` stand for equal tokens, which are made up."""

    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    timestamp: float | None = None  # ms
    hash_ids: list[int] = []


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What one benchmark sends to a deployment."""

    url: str = ""
    api_key: str | None = None
    input_tokens: Sequence[int] = (128,)
    output_tokens: int = 32
    concurrencies: Sequence[int] = (1, 4, 16)
    request_rates: Sequence[float] = ()  # requests a second, in place of ``concurrencies``
    burstiness: float = 1.0
    num_requests: int | None = None  # for each load
    max_token_id: int = 30_000
    seed: int | None = None
    goals: Goals = Goals()
    trace: Sequence[TraceRequest] = ()  # in place of random prompts
    trace_speed: float = 1.0


class BenchLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one row, and when they are sent."""

    input_tokens: int
    requests: Sequence[PlannedRequest]
    concurrency: int | None = None
    request_rate: float | None = None
    times_s: Sequence[float] = ()
    """Seconds from the start at which requests are sent, without a ``concurrency``."""
    num_left_out: int = 0  # requests of the trace that are too long for the model


def read_trace_file(path: Path) -> list[TraceRequest]:
    """Read a trace, in the order of its times if it has any. Raises ConfigError."""
    requests: list[TraceRequest] = []
    place = 0
    try:
        for place, line in enumerate(path.read_bytes().splitlines(), 1):  # noqa: B007 - for errors
            if line.strip():
                requests.append(msgspec.json.decode(line, type=TraceRequest))
    except OSError as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: line {place}: {error}") from None
    if not requests:
        raise ConfigError(f"--trace {path} has no request")
    if all(request.timestamp is not None for request in requests):
        requests.sort(key=lambda request: request.timestamp or 0.0)
    return requests


def plan_loads(
    options: BenchOptions, model: str, max_model_len: int | None, rng: random.Random
) -> list[BenchLoad]:
    """Return the load of each row. Raises PdlaunchError for more than the context can hold."""
    if options.trace:
        return _trace_loads(options, max_model_len, rng)
    for num_tokens in options.input_tokens:
        if max_model_len is not None and num_tokens + options.output_tokens > max_model_len:
            raise PdlaunchError(
                f"a prompt of {num_tokens} tokens and {options.output_tokens} tokens of output are "
                f"more than max_model_len {max_model_len} of {model!r}: ask for fewer tokens, or "
                "serve the model with a larger --max-model-len"
            )
    return [load for number in options.input_tokens for load in _loads_of(options, number, rng)]


def _loads_of(options: BenchOptions, input_tokens: int, rng: random.Random) -> list[BenchLoad]:
    """Return the loads of random prompts of one length."""
    token_ids = range(FIRST_TOKEN_ID, options.max_token_id)

    def load(num_requests: int) -> BenchLoad:
        # Drawn before the load begins: while it runs, nothing but requests takes time.
        prompts = [rng.choices(token_ids, k=input_tokens) for _ in range(num_requests)]
        requests = [(partial(list[int], prompt), options.output_tokens) for prompt in prompts]
        return BenchLoad(input_tokens=input_tokens, requests=requests)

    at_rates = [
        _at_rate(load(options.num_requests or 32), rate, options.burstiness, rng)
        for rate in options.request_rates
    ]
    at_once = [
        # Four rounds, at least 8 requests.
        msgspec.structs.replace(load(options.num_requests or max(8, 4 * n)), concurrency=n)
        for n in options.concurrencies
    ]
    return at_rates + at_once


def _trace_loads(
    options: BenchOptions, max_model_len: int | None, rng: random.Random
) -> list[BenchLoad]:
    """Return one load for each concurrency or rate; for a trace, a single load with its times."""
    limit = max_model_len or math.inf
    fitting = [each for each in options.trace if each.input_length + each.output_length <= limit]
    if not fitting:
        raise PdlaunchError(
            f"every request of the trace is longer than max_model_len {limit}: serve the model "
            "with a larger --max-model-len if it allows it"
        )
    # One seed for all loads: equal hashes are equal tokens in each of them.
    seed, token_ids = rng.randrange(2**32), range(FIRST_TOKEN_ID, options.max_token_id)
    base = BenchLoad(
        input_tokens=round(sum(each.input_length for each in fitting) / len(fitting)),
        requests=[
            (partial(trace_prompt, each, token_ids, f"{seed}/{number}", seed), each.output_length)
            for number, each in enumerate(fitting)
        ],
        num_left_out=len(options.trace) - len(fitting),
    )
    if options.request_rates:
        return [_at_rate(base, rate, options.burstiness, rng) for rate in options.request_rates]
    times_ms = [each.timestamp for each in fitting if each.timestamp is not None]
    if options.concurrencies or len(times_ms) < len(fitting):
        numbers = options.concurrencies or (1,)
        return [msgspec.structs.replace(base, concurrency=number) for number in numbers]
    times_s = [(at_ms - times_ms[0]) / 1000 / options.trace_speed for at_ms in times_ms]
    return [msgspec.structs.replace(base, times_s=times_s)]


def trace_prompt(request: TraceRequest, token_ids: range, own_seed: str, seed: int) -> list[int]:
    """Return token ids: hashed blocks depend on hash and ``seed``, the rest on ``own_seed``."""
    tokens: list[int] = []
    for hash_id in request.hash_ids[: -(-request.input_length // HASHED_TOKENS)]:
        tokens += random.Random(f"{seed}/hash {hash_id}").choices(token_ids, k=HASHED_TOKENS)
    num_missing = max(0, request.input_length - len(tokens))
    tokens += random.Random(own_seed).choices(token_ids, k=num_missing)
    return tokens[: request.input_length]


def _at_rate(load: BenchLoad, rate: float, burstiness: float, rng: random.Random) -> BenchLoad:
    times_s = arrival_times(rate, burstiness, len(load.requests), rng)
    return msgspec.structs.replace(load, request_rate=rate, times_s=times_s)


def arrival_times(
    rate: float, burstiness: float, num_requests: int, rng: random.Random
) -> list[float]:
    """Return the seconds from the start at which requests are sent, ``rate`` a second on average.

    The gaps are gamma distributed with shape ``burstiness``, as in vLLM's benchmark: 1 is a
    Poisson process, smaller values make bursts.
    """
    # The mean of a gamma distribution is shape x scale, here 1 / rate.
    scale = 1 / (rate * burstiness)
    pauses = (rng.gammavariate(burstiness, scale) for _ in range(num_requests - 1))
    return list(accumulate(pauses, initial=0.0))
