"""Plans the requests of a benchmark and their times: random prompts, or a trace in Mooncake's
format.

Source of the format: https://github.com/kvcache-ai/Mooncake (traces).
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pdlaunch.bench.timed_completion import Goals
from pdlaunch.errors import ConfigError, PdlaunchError

FIRST_TOKEN_ID = 100  # special tokens have lower ids
HASHED_TOKENS = 512  # tokens for each entry of ``hash_ids``

# A function that returns the prompt, called at sending because prompts of a trace are large; and
# the number of output tokens
PlannedRequest = tuple[Callable[[], list[int]], int]


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of a trace. Equal ``hash_ids`` stand for equal tokens; we draw these at random."""

    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    timestamp: float  # ms
    hash_ids: list[int] = []


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a benchmark of a deployment."""

    url: str = ""
    api_key: str | None = None
    input_tokens: Sequence[int] = (128,)
    output_tokens: int = 32
    concurrencies: Sequence[int] = (1, 4, 16)
    request_rates: Sequence[float] = ()  # requests per second, instead of ``concurrencies``
    burstiness: float = 1.0
    num_requests: int | None = None  # for each load
    max_token_id: int = 30_000
    seed: int | None = None
    goals: Goals = Goals()
    trace: Sequence[TraceRequest] = ()  # instead of random prompts
    trace_speed: float = 1.0


class BenchLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one row, and their times."""

    input_tokens: int
    requests: Sequence[PlannedRequest]
    concurrency: int | None = None
    request_rate: float | None = None
    # Without ``concurrency``: when each request is sent, in seconds from the start
    times_s: Sequence[float] = ()
    num_left_out: int = 0  # requests of the trace that are too long for the model


def read_trace_file(path: Path) -> list[TraceRequest]:
    """Read a trace, in the order of its times. Raises ConfigError."""
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
    return sorted(requests, key=lambda request: request.timestamp)


def plan_loads(
    options: BenchOptions, model: str, max_model_len: int | None, rng: random.Random
) -> list[BenchLoad]:
    """Return the load of each row. Raises PdlaunchError for requests beyond ``max_model_len``."""
    if options.trace:
        return [_trace_load(options, max_model_len, rng)]
    for num_tokens in options.input_tokens:
        if max_model_len is not None and num_tokens + options.output_tokens > max_model_len:
            raise PdlaunchError(
                f"{num_tokens} prompt tokens and {options.output_tokens} output tokens exceed "
                f"max_model_len {max_model_len} of {model!r}: request fewer tokens, or serve the "
                "model with a larger --max-model-len"
            )
    return [load for number in options.input_tokens for load in _loads_of(options, number, rng)]


def _loads_of(options: BenchOptions, input_tokens: int, rng: random.Random) -> list[BenchLoad]:
    """Return the loads of random prompts of one length."""
    token_ids = range(FIRST_TOKEN_ID, options.max_token_id)

    def load(num_requests: int, **how: Any) -> BenchLoad:
        # Prompts are drawn before the load begins, so that drawing does not delay requests.
        prompts = [rng.choices(token_ids, k=input_tokens) for _ in range(num_requests)]
        requests = [(partial(list[int], prompt), options.output_tokens) for prompt in prompts]
        return BenchLoad(input_tokens=input_tokens, requests=requests, **how)

    loads = []
    for rate in options.request_rates:
        number = options.num_requests or 32
        times_s = arrival_times(rate, options.burstiness, number, rng)
        loads.append(load(number, request_rate=rate, times_s=times_s))
    for at_once in options.concurrencies:
        # By default four rounds, but at least 8 requests.
        number = options.num_requests or max(8, 4 * at_once)
        loads.append(load(number, concurrency=at_once))
    return loads


def _trace_load(options: BenchOptions, max_model_len: int | None, rng: random.Random) -> BenchLoad:
    """Return the load of a trace, sent at the times of the trace."""
    limit = max_model_len or math.inf
    fitting = [each for each in options.trace if each.input_length + each.output_length <= limit]
    if not fitting:
        reason = f"every request of the trace is longer than max_model_len {limit}"
        fix = "serve the model with a larger --max-model-len if it allows it"
        raise PdlaunchError(f"{reason}: {fix}")
    seed, token_ids = rng.randrange(2**32), range(FIRST_TOKEN_ID, options.max_token_id)
    start_ms = fitting[0].timestamp
    return BenchLoad(
        input_tokens=round(sum(each.input_length for each in fitting) / len(fitting)),
        requests=[
            (partial(trace_prompt, each, token_ids, f"{seed}/{number}", seed), each.output_length)
            for number, each in enumerate(fitting)
        ],
        times_s=[(each.timestamp - start_ms) / 1000 / options.trace_speed for each in fitting],
        num_left_out=len(options.trace) - len(fitting),
    )


def trace_prompt(
    request: TraceRequest, token_ids: range, own_seed: str, seed: int | str
) -> list[int]:
    """Return token ids: hashed blocks depend on hash and ``seed``, the rest on ``own_seed``."""
    tokens: list[int] = []
    for hash_id in request.hash_ids[: -(-request.input_length // HASHED_TOKENS)]:
        tokens += random.Random(f"{seed}/hash {hash_id}").choices(token_ids, k=HASHED_TOKENS)
    num_missing = max(0, request.input_length - len(tokens))
    tokens += random.Random(own_seed).choices(token_ids, k=num_missing)
    return tokens[: request.input_length]


def arrival_times(
    rate: float, burstiness: float, num_requests: int, rng: random.Random
) -> list[float]:
    """Return when requests are sent, in seconds from the start. The gaps are gamma distributed with
    shape ``burstiness``, as in vLLM's benchmark: 1 is Poisson, smaller values give bursts.
    """
    # The mean of a gamma distribution is shape x scale, here 1 / rate.
    scale = 1 / (rate * burstiness)
    pauses = (rng.gammavariate(burstiness, scale) for _ in range(num_requests - 1))
    return list(accumulate(pauses, initial=0.0))
