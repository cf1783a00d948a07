"""Plans load, sends it to a running deployment, and summarises what clients see.

Prompts are random token ids, different in every run, so that no prefix cache helps, or those of a
trace in Mooncake's format (https://github.com/kvcache-ai/Mooncake). ``ignore_eos`` fixes the output
length.
"""

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec

from pdlaunch.bench.timed_completion import (
    Goals,
    TimedCompletion,
    complete,
    describe_failure,
    read_refusal,
)
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.launch.client.api import check_url
from pdlaunch.protocol.status import RouteShare, route_shares

REQUEST_TIMEOUT_S = 600.0
_MAX_ERRORS = 3
ShowProgress = Callable[[str], None]
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


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one load, as clients see them; None if a figure was not measured."""

    input_tokens: int  # for a trace: the mean
    concurrency: int | None
    request_rate: float | None = None
    burstiness: float | None = None
    num_requests: int
    num_errors: int
    num_left_out: int = 0
    seconds: float
    requests_per_s: float  # requests without an error, like the next two figures
    total_prompt_tokens: int
    total_output_tokens: int
    goodput_per_s: float | None = None  # requests per second that met the goals
    good_share: float | None = None
    cached_share: float | None = None  # prompt tokens that were not computed
    pair_share: float | None = None  # share of requests served by a prefill and a decode engine
    routes: list[RouteShare] = []
    ttft_ms_median: float | None
    ttft_ms_p99: float | None
    # Gap between the first and the second token, in which KV blocks move from prefill to decode
    first_gap_ms_median: float | None
    first_gap_ms_p99: float | None
    itl_ms_median: float | None  # gaps between tokens, from the second token on
    itl_ms_p99: float | None
    e2e_ms_median: float | None
    tpot_ms_median: float | None  # (last token - first token) / (tokens - 1)
    output_tokens_per_s: float
    errors: list[str] = []  # the most frequent errors with their counts: ``12 x MESSAGE``

    @property
    def load(self) -> str:
        """Return how the requests were sent, in words."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return "as in the trace" if self.request_rate is None else f"{self.request_rate:g} a second"


class BenchRun(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table, with the requests that it summarises."""

    row: BenchRow
    done: list[TimedCompletion]
    model: str


async def bench_serve(options: BenchOptions, show: ShowProgress) -> AsyncIterator[BenchRun]:
    """Send a warm-up request for each prompt length, then measure one load after the other. Raises
    PdlaunchError if the deployment cannot be used.
    """
    check_url(options.url)
    async with client_session(options.url, options.api_key) as session:
        model, max_model_len = await model_of(session, options.url)
        # A new seed in every run: prefix caches may still have the prompts of earlier runs.
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        loads = plan_loads(options, model, max_model_len, rng)
        for num_tokens in dict.fromkeys(load.input_tokens for load in loads):
            show(f"warming up with a prompt of {num_tokens} tokens")
            prompt = rng.choices(range(FIRST_TOKEN_ID, options.max_token_id), k=num_tokens)
            # A short answer fits even if the requests of a trace are near max_model_len.
            output_tokens = 2 if options.trace else options.output_tokens
            warm_up = await complete(session, model, prompt, output_tokens)
            if warm_up.error is not None:
                request = f"a request of {num_tokens} prompt tokens"
                raise PdlaunchError(f"the deployment refuses {request}: {warm_up.error}")
        start_at, num_done, num_all = time.monotonic(), 0, sum(len(load.requests) for load in loads)

        async def send(planned: PlannedRequest) -> TimedCompletion:
            nonlocal num_done
            make_prompt, output_tokens = planned
            completion = await complete(session, model, make_prompt(), output_tokens)
            num_done += 1
            left_s = (time.monotonic() - start_at) / num_done * (num_all - num_done)
            show(f"{num_done} of {num_all} requests, about {left_s:.0f} s left")
            return completion

        for load in loads:
            done, seconds = await _run(load, send)
            row = summarise(load, done, seconds, options.goals, options.burstiness)
            yield BenchRun(row=row, done=done, model=model)


def client_session(url: str, api_key: str | None) -> aiohttp.ClientSession:
    """Return the HTTP session of all clients of a load; use it as a context manager."""
    return aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        # No limit on connections: the load determines their number.
        connector=aiohttp.TCPConnector(limit=0),
    )


async def model_of(session: aiohttp.ClientSession, url: str) -> tuple[str, int | None]:
    """Return the served model's name, and its ``max_model_len`` if the deployment reports it."""
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise PdlaunchError(f"{response.url} answers {await read_refusal(response)}")
            card = (await response.json(content_type=None))["data"][0]
            model, max_model_len = str(card["id"]), card.get("max_model_len")
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = describe_failure(error)
        raise PdlaunchError(f"{url} does not answer /v1/models: {reason}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise PdlaunchError(f"{url} answers /v1/models without a list of models") from error
    return model, max_model_len if type(max_model_len) is int else None


async def _run(
    load: BenchLoad, send: Callable[[PlannedRequest], Awaitable[TimedCompletion]]
) -> tuple[list[TimedCompletion], float]:
    """Send the requests of a load. Return them, and the duration of the load in seconds."""
    done: list[TimedCompletion] = []
    waiting = iter(load.requests)

    async def work(planned: Iterable[PlannedRequest]) -> None:
        # A worker sends its next request when its last one has ended.
        for each in planned:
            done.append(await send(each))  # noqa: PERF401 - all workers append

    start_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency or 0):
            group.create_task(work(waiting))
        for at_s in load.times_s:
            await asyncio.sleep(max(0.0, start_at + at_s - time.perf_counter()))
            group.create_task(work([next(waiting)]))
    return done, time.perf_counter() - start_at


def summarise(
    load: BenchLoad,
    done: Collection[TimedCompletion],
    seconds: float,
    goals: Goals | None = None,
    burstiness: float = 1.0,
) -> BenchRow:
    """Return the figures of a load that took ``seconds``."""
    good = [each for each in done if each.error is None]
    # Requests with a single token have no gap to measure.
    several = [each for each in good if len(each.tokens_at) > 1]
    cached = [each for each in good if each.num_cached_tokens is not None]
    routes = [each.route for each in good if each.route is not None]
    num_within = sum(map(goals.met_by, done)) if goals else None
    # Equal errors are counted together, so that a thousand equal errors make one line.
    errors = Counter(each.error for each in done if each.error is not None)
    times_s = {
        "ttft": [each.ttft_s for each in good],
        "first_gap": [each.all_gaps_s[0] for each in several],
        "itl": [gap_s for each in good for gap_s in each.inter_token_s],
        "e2e": [each.e2e_s for each in good],
        "tpot": [sum(each.all_gaps_s) / (each.num_tokens - 1) for each in several],
    }
    figures = {f"{name}_ms_median": quantile_ms(of, 0.5) for name, of in times_s.items()}
    for name in ("ttft", "first_gap", "itl"):
        figures[f"{name}_ms_p99"] = quantile_ms(times_s[name], 0.99)
    return BenchRow(
        input_tokens=load.input_tokens,
        concurrency=load.concurrency,
        request_rate=load.request_rate,
        burstiness=None if load.request_rate is None else burstiness,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        num_left_out=load.num_left_out,
        seconds=round(seconds, 3),
        requests_per_s=round(len(good) / seconds, 3),
        total_prompt_tokens=sum(each.num_prompt_tokens for each in good),
        total_output_tokens=sum(each.num_tokens for each in good),
        goodput_per_s=_ratio(num_within, seconds, 3),
        good_share=_ratio(num_within, max(len(done), 1), 4),
        cached_share=_ratio(
            sum(each.num_cached_tokens or 0 for each in cached),
            sum(each.num_prompt_tokens for each in cached),
            3,
        ),
        pair_share=_ratio(sum(kind == "pair" for kind, _ in routes), len(routes), 3),
        routes=route_shares(routes),
        output_tokens_per_s=round(sum(each.num_tokens for each in good) / seconds, 1),
        errors=[f"{count} x {reason}" for reason, count in errors.most_common(_MAX_ERRORS)],
        **figures,
    )


def quantile_ms(seconds: Sequence[float], quantile: float) -> float | None:
    """Return a quantile in milliseconds, or None without values."""
    if not seconds:
        return None
    if quantile == 0.5:
        return round(statistics.median(seconds) * 1000, 2)
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000, 2)


def _ratio(value: float | None, of: float, digits: int) -> float | None:
    return round(value / of, digits) if value is not None and of else None


def without_words(errors: Collection[str]) -> list[str]:
    """Shorten errors to ``12 x HTTP 429``: messages may quote prompts, and users share reports."""
    short = []
    for error in errors:
        count, _, reason = error.partition(" x ")
        is_status = reason.startswith("HTTP ")
        short.append(f"{count} x {reason.partition(':')[0] if is_status else 'no whole answer'}")
    return short


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
            tokens = f"{num_tokens} prompt tokens and {options.output_tokens} output tokens"
            fix = "request fewer tokens, or serve the model with a larger --max-model-len"
            raise PdlaunchError(
                f"{tokens} exceed max_model_len {max_model_len} of {model!r}: {fix}"
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
    """Turn a trace into a load: its requests, each with the time at which to send it."""
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
    """Draw the prompt's token ids; blocks with the same hash get the same tokens."""
    tokens: list[int] = []
    for hash_id in request.hash_ids[: -(-request.input_length // HASHED_TOKENS)]:
        tokens += random.Random(f"{seed}/hash {hash_id}").choices(token_ids, k=HASHED_TOKENS)
    num_missing = max(0, request.input_length - len(tokens))
    tokens += random.Random(own_seed).choices(token_ids, k=num_missing)
    return tokens[: request.input_length]


def arrival_times(
    rate: float, burstiness: float, num_requests: int, rng: random.Random
) -> list[float]:
    """Return when requests are sent, in seconds from the start: on average ``rate`` per second. The
    gaps are gamma distributed with shape ``burstiness``, as in vLLM's benchmark: 1 is Poisson,
    smaller values give bursts.
    """
    # The mean of a gamma distribution is shape x scale, here 1 / rate.
    scale = 1 / (rate * burstiness)
    pauses = (rng.gammavariate(burstiness, scale) for _ in range(num_requests - 1))
    return list(accumulate(pauses, initial=0.0))
