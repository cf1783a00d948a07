"""``pdlaunch bench serve``: drive a running deployment through its public API and measure what a client sees.

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos`` fixes the output length.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
import urllib.parse
from collections.abc import Sequence

import aiohttp
import msgspec

from pdlaunch.errors import PdlaunchError


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark of a deployment."""

    url: str
    api_key: str | None = None
    input_tokens: int = 128
    output_tokens: int = 32
    num_requests: int | None = None
    """For each concurrency; None: four rounds, at least eight."""
    max_token_id: int = 30_000
    """Prompts are drawn from [100, max_token_id)."""
    seed: int | None = None
    request_timeout_s: float = 600.0


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one concurrency; milliseconds and tokens per second."""

    concurrency: int
    num_requests: int
    num_errors: int
    seconds: float
    ttft_ms_median: float
    ttft_ms_p99: float
    itl_ms_median: float
    itl_ms_p99: float
    tpot_ms_median: float
    """Of each request: (last token - first token) / (tokens - 1)."""
    output_tokens_per_s: float
    errors: list[str] = []
    """The first few, as the deployment worded them."""


class _Request(msgspec.Struct):
    """Times of one request, in seconds of the event loop's clock."""

    start_s: float
    token_times_s: list[float]
    num_tokens: int = 0
    error: str | None = None


async def bench_serve(options: BenchOptions, concurrencies: Sequence[int]) -> list[BenchRow]:
    """Run every concurrency in turn, after one warm-up request. Raises PdlaunchError when the deployment cannot be used."""
    _check_url(options.url)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=options.request_timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(options.url, headers=headers, timeout=timeout, connector=connector) as session:
        model = await _model_name(session)
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        await _send(session, model, _prompt(rng, options), options.output_tokens)
        return [await _run(session, model, options, concurrency, rng) for concurrency in concurrencies]


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise PdlaunchError(f"{url} is no URL of a deployment; write http://host:port")


async def _model_name(session: aiohttp.ClientSession) -> str:
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise PdlaunchError(f"{response.url} answers {await _refusal(response)}")
            body = await response.json()
            return str(body["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise PdlaunchError(f"{session._base_url} does not answer /v1/models: {_reason(error)}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise PdlaunchError(f"{session._base_url} answers /v1/models, but with no list of models") from error


async def _refusal(response: aiohttp.ClientResponse) -> str:
    return f"HTTP {response.status}: {(await response.text())[:200]}"


def _reason(error: aiohttp.ClientError | TimeoutError) -> str:
    """For people: ``Connection refused`` and not what the client library keeps of the attempt."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno:
        # Names that cannot be resolved have negative numbers, which the system has no words for.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__


async def _run(
    session: aiohttp.ClientSession, model: str, options: BenchOptions, concurrency: int, rng: random.Random
) -> BenchRow:
    num_requests = options.num_requests or max(8, 4 * concurrency)
    prompts = [_prompt(rng, options) for _ in range(num_requests)]
    done: list[_Request] = []

    async def worker() -> None:
        while prompts:
            done.append(await _send(session, model, prompts.pop(), options.output_tokens))

    start_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return _summarise(concurrency, done, time.perf_counter() - start_s)


async def _send(session: aiohttp.ClientSession, model: str, prompt: list[int], output_tokens: int) -> _Request:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = _Request(start_s=time.perf_counter(), token_times_s=[])
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                request.error = await _refusal(response)
                return request
            async for line in response.content:
                _read_event(line, request)
    except (aiohttp.ClientError, TimeoutError) as error:
        request.error = _reason(error)
    if request.error is None and request.num_tokens != output_tokens:
        request.error = f"{request.num_tokens} tokens instead of {output_tokens}"
    return request


def _read_event(line: bytes, request: _Request) -> None:
    if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
        return
    event = json.loads(line[5:])
    if "error" in event:
        request.error = str(event["error"])[:200]
    if event.get("choices"):
        request.token_times_s.append(time.perf_counter())
    if event.get("usage"):
        request.num_tokens = event["usage"]["completion_tokens"]


def _prompt(rng: random.Random, options: BenchOptions) -> list[int]:
    return [rng.randrange(100, options.max_token_id) for _ in range(options.input_tokens)]


def _summarise(concurrency: int, done: list[_Request], seconds: float) -> BenchRow:
    good = [request for request in done if request.error is None]
    ttft = [request.token_times_s[0] - request.start_s for request in good]
    gaps = [
        late - early for request in good for early, late in zip(request.token_times_s, request.token_times_s[1:], strict=False)
    ]
    tpot = [
        (request.token_times_s[-1] - request.token_times_s[0]) / (request.num_tokens - 1)
        for request in good
        if request.num_tokens > 1
    ]
    return BenchRow(
        concurrency=concurrency,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        seconds=round(seconds, 3),
        ttft_ms_median=_ms(ttft, 0.5),
        ttft_ms_p99=_ms(ttft, 0.99),
        itl_ms_median=_ms(gaps, 0.5),
        itl_ms_p99=_ms(gaps, 0.99),
        tpot_ms_median=_ms(tpot, 0.5),
        output_tokens_per_s=round(sum(request.num_tokens for request in good) / seconds, 1),
        errors=[request.error for request in done if request.error is not None][:3],
    )


def _ms(seconds: list[float], quantile: float) -> float:
    """Quantile in milliseconds; NaN without values."""
    if not seconds:
        return float("nan")
    if quantile == 0.5:
        return round(statistics.median(seconds) * 1000, 2)
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000, 2)
