"""Says what a benchmark sends to a deployment, and when: random prompts, or the requests of a file.


Mooncake: a JSON object a line with ``timestamp`` (ms), ``input_length``, ``output_length`` (tokens)
and ``hash_ids``, each of which stands for 512 tokens of the prompt: equal ids, equal tokens. What
the tokens are is made up. Source: https://github.com/kvcache-ai/Mooncake (traces).

Conversations: ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`` or
``{"messages": [{"role": "user", "content": ...}, ...]}``, a line each or one JSON list. Every
answer becomes a request: all that was said before is its prompt, its length the number of tokens
asked for. A ``timestamp`` in ms may stand beside them.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from pdlaunch.bench.serve.target import BenchTarget
from pdlaunch.bench.serve.timed_completion import Goals, describe_failure, read_refusal
from pdlaunch.errors import ConfigError, PdlaunchError

HASHED_TOKENS = 512  # tokens that one of ``hash_ids`` stands for
_AT_ONCE = 8
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_FORMS = ("input_length", "conversations", "messages")


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one request of a trace; a conversation is not tokenized yet."""

    prompt: list[dict[str, str]] | list[int] = []
    """The messages or token ids; empty: the tokens are made of ``hash_ids``."""
    output: int | str  # number of tokens, or the recorded answer
    num_tokens: int = 0  # length of a prompt that has no messages
    hash_ids: Sequence[int] = ()
    at_s: float | None = None  # seconds since the first request
    number: int = 0  # place in the trace

    @property
    def num_prompt_tokens(self) -> int:
        """Return the length of a prompt, which is known of a conversation once it is tokenized."""
        return self.num_tokens or len(self.prompt)

    @property
    def output_tokens(self) -> int:
        return self.output if isinstance(self.output, int) else len(self.output)


class _Mooncake(msgspec.Struct):
    input_length: int
    output_length: int
    timestamp: float | None = None
    hash_ids: list[int] = []


class _Message(msgspec.Struct):
    role: str
    content: str


def read_trace_file(path: Path) -> list[TraceRequest]:
    """Read a trace in order of time. Raises ConfigError that names line and member."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}") from None
    requests: list[TraceRequest] = []
    place = ""
    try:
        if text.lstrip().startswith("["):
            for number, record in enumerate(msgspec.json.decode(text), 1):
                place = f" entry {number}:"
                requests += _read(record)
        else:
            for number, line in enumerate(text.splitlines(), 1):
                place = f" line {number}:"
                if line.strip():
                    requests += _read(msgspec.json.decode(line))
    except msgspec.ValidationError as error:
        raise ConfigError(f"--trace {path}:{place} {error}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--trace {path}:{place} no JSON: {error}") from None
    if not requests:
        raise ConfigError(f"--trace {path} has no request")
    timed = all(request.at_s is not None for request in requests)
    if timed:
        requests.sort(key=lambda request: request.at_s or 0.0)
    first_s = requests[0].at_s or 0.0
    return [
        msgspec.structs.replace(
            request, number=number, at_s=(request.at_s or 0.0) - first_s if timed else None
        )
        for number, request in enumerate(requests)
    ]


def _read(record: Any) -> Iterator[TraceRequest]:
    """Yield the requests of one record. Raises msgspec.ValidationError."""
    form = next((name for name in _FORMS if isinstance(record, dict) and name in record), None)
    if form is None:
        raise msgspec.ValidationError(f"it has none of {', '.join(_FORMS)}")
    at_ms = msgspec.convert(record.get("timestamp"), float | None)
    at_s = None if at_ms is None else at_ms / 1000
    if form == "input_length":
        found = msgspec.convert(record, _Mooncake)
        if found.input_length < 1 or found.output_length < 1:
            raise msgspec.ValidationError("input_length and output_length must be 1 or more")
        yield TraceRequest(
            output=found.output_length,
            num_tokens=found.input_length,
            hash_ids=found.hash_ids,
            at_s=at_s,
        )
        return
    messages: list[dict[str, str]] = []
    names = ("from", "value") if form == "conversations" else ("role", "content")
    for each in msgspec.convert(record[form], list[dict[str, Any]]):
        said = msgspec.convert(
            {"role": each.get(names[0]), "content": each.get(names[1])}, _Message
        )
        role = _ROLES.get(said.role, said.role)
        if role == "assistant" and messages and said.content:
            yield TraceRequest(prompt=messages.copy(), output=said.content, at_s=at_s)
        messages.append({"role": role, "content": said.content})


async def tokenize(target: BenchTarget, requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Return the requests with the token ids of conversations, which the deployment tells.

    Raises PdlaunchError when it does not.
    """
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(request: TraceRequest) -> TraceRequest:
        if not isinstance(request.output, str):
            return request
        async with places:
            prompt = await _ask(target, {"messages": request.prompt, "add_generation_prompt": True})
            answer = await _ask(target, {"prompt": request.output, "add_special_tokens": False})
        return msgspec.structs.replace(request, prompt=prompt, output=max(1, len(answer)))

    return list(await asyncio.gather(*map(one, requests)))


async def _ask(target: BenchTarget, question: dict[str, Any]) -> list[int]:
    body = {"model": target.model} | question
    try:
        async with target.session.post("/tokenize", json=body) as response:
            if response.status != 200:
                raise PdlaunchError(
                    f"a conversation of the trace cannot be tokenized: /tokenize answers "
                    f"{await read_refusal(response)}"
                )
            return list((await response.json(content_type=None))["tokens"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise PdlaunchError(f"/tokenize does not answer: {describe_failure(error)}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise PdlaunchError("/tokenize answers, but without tokens") from error


def prompt_tokens(request: TraceRequest, token_ids: range, seed: int) -> list[int]:
    """Return the prompt's token ids; those that stand for a hash are made of it and the seed."""
    if not request.num_tokens:
        return [token for token in request.prompt if isinstance(token, int)]
    num_tokens, tokens = request.num_tokens, list[int]()
    for hash_id in request.hash_ids[: -(-num_tokens // HASHED_TOKENS)]:
        tokens += random.Random(f"{seed}/{hash_id}").choices(token_ids, k=HASHED_TOKENS)
    rest = random.Random(f"{seed}/of {request.number}")
    return (tokens + rest.choices(token_ids, k=max(0, num_tokens - len(tokens))))[:num_tokens]


FIRST_TOKEN_ID = 100  # lowest token id of a prompt: prompts keep away from special tokens


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sets what one benchmark sends to a deployment."""

    url: str = ""
    api_key: str | None = None
    input_tokens: Sequence[int] = (128,)
    output_tokens: int = 32
    concurrencies: Sequence[int] = (1, 4, 16)
    num_requests: int | None = None
    """Requests for each length and concurrency; None: four rounds, at least eight."""
    max_token_id: int = 30_000  # prompts are drawn from [FIRST_TOKEN_ID, max_token_id)
    seed: int | None = None
    request_timeout_s: float = 600.0
    bare_gb_per_s: Mapping[int, float] = {}
    """Speed of a bare transfer by prompt length, for the goal of the first gap."""
    step_ms: Mapping[int, float] = {}  # decode step by concurrency, for the share of what it allows
    request_rates: Sequence[float] = ()  # requests sent a second, instead of ``concurrencies``
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
