"""Sends a completion, records when its tokens came, and compares the times with goals."""

import math
import os
import re
import time
from collections.abc import AsyncIterable, Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import aiohttp
import msgspec

from pdlaunch.http.headers import ROUTE_HEADER

_MAX_REASON_LENGTH = 300
_ITL_SHARE = 0.99
_ROUTE = re.compile(r'; kind=(\w+); reason="([^"]*)"')


class TimedCompletion(msgspec.Struct):
    """One completion; times are instants of ``time.perf_counter``."""

    start_at: float  # instant just before the request is written
    # Instants at which the output tokens were read; tokens of the same read have the same instant
    tokens_at: list[float] = []
    num_tokens: int = 0  # output tokens as the deployment counts them
    num_prompt_tokens: int = 0
    # Prompt tokens that were not computed, if the deployment reports them
    num_cached_tokens: int | None = None
    error: str | None = None
    route: tuple[str, str] | None = None  # kind and reason, if the router reports them

    @property
    def ttft_s(self) -> float:
        return self.tokens_at[0] - self.start_at

    @property
    def e2e_s(self) -> float:
        return self.tokens_at[-1] - self.start_at

    @property
    def all_gaps_s(self) -> list[float]:
        """Return the times between tokens; KV blocks move from prefill to decode in the first."""
        return [late - early for early, late in pairwise(self.tokens_at)]

    @property
    def inter_token_s(self) -> list[float]:
        return self.all_gaps_s[1:]


_Limit = Annotated[float, msgspec.Meta(gt=0)] | None


class Goals(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename=lambda name: name.removesuffix("_ms"),
):
    """Upper limits in milliseconds; None: no limit."""

    ttft_ms: _Limit = None
    tpot_ms: _Limit = None  # mean time between the tokens of a request
    itl_ms: _Limit = None  # for 99 % of a request's gaps between tokens, including the first gap
    e2e_ms: _Limit = None  # time from the request to its last token

    def __bool__(self) -> bool:
        return self != Goals()

    def __str__(self) -> str:
        limits = msgspec.structs.asdict(self).items()
        given = [(name, limit) for name, limit in limits if limit is not None]
        return ", ".join(f"{name.removesuffix('_ms')} {limit:g} ms" for name, limit in given)

    def met_by(self, completion: TimedCompletion) -> bool:
        """Return True if the request was answered without an error and within all limits."""
        if completion.error is not None:
            return False
        gaps_s = sorted(completion.all_gaps_s) or [0.0]
        tpot_s, itl_s = sum(gaps_s) / len(gaps_s), gaps_s[math.ceil(_ITL_SHARE * len(gaps_s)) - 1]
        # In the order of the fields
        took_s = (completion.ttft_s, tpot_s, itl_s, completion.e2e_s)
        limits = zip(msgspec.structs.astuple(self), took_s, strict=True)
        return all(limit is None or time_s * 1000 <= limit for limit, time_s in limits)


def read_goals(text: str) -> Goals:
    """Read ``ttft=200,itl=50``, in milliseconds. Raises ValueError."""
    pairs = (part.strip().partition("=") for part in text.split(","))
    try:
        return msgspec.convert({name: value for name, _, value in pairs}, Goals, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}; write ttft=200,tpot=30,itl=50,e2e=3000, each in ms") from None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    """The members of a chunk that the benchmark reads; the decoder skips the others."""

    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)


async def complete(
    session: aiohttp.ClientSession, model: str, prompt: Sequence[int], output_tokens: int
) -> TimedCompletion:
    """Request exactly ``output_tokens`` greedy tokens. Failures are recorded in ``error``."""
    body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    # The text of a token comes later if it ends inside a character; its id never does.
    data = msgspec.json.encode(body | {"return_token_ids": True})
    headers = {"Content-Type": "application/json"}
    completion = TimedCompletion(start_at=time.perf_counter(), num_prompt_tokens=len(prompt))
    try:
        async with session.post("/v1/completions", data=data, headers=headers) as response:
            if response.status != 200:
                completion.error = await read_refusal(response)
            else:
                if found := _ROUTE.search(response.headers.get(ROUTE_HEADER, "")):
                    completion.route = (found[1], found[2])
                await read_stream(response.content.iter_any(), completion)
    except (aiohttp.ClientError, TimeoutError) as error:
        completion.error = describe_failure(error)
    except msgspec.MsgspecError as error:
        completion.error = f"an event is not in OpenAI's format: {error}"
    if completion.error is None and completion.num_tokens != output_tokens:
        completion.error = f"{completion.num_tokens} tokens instead of {output_tokens}"
    if completion.error is None and not completion.tokens_at:
        completion.error = "no chunk with a token"
    return completion


async def read_stream(
    pieces: AsyncIterable[bytes],
    completion: TimedCompletion,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Read server-sent events. All events of a piece have the time at which it came, so that the
    time for decoding does not count. Raises msgspec.MsgspecError.
    """
    rest = b""
    async for piece in pieces:
        now = clock()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data:"):
                _take(_event_decoder.decode(line[5:]), now, completion)
    completion.error = completion.error or "the stream ended without [DONE]"


def _take(event: _Event, now: float, completion: TimedCompletion) -> None:
    if event.error is not None:
        completion.error = f"in the stream: {_message(event.error)}"
    for choice in event.choices:
        # Servers that do not support return_token_ids send one token in each chunk.
        num_tokens = 1 if choice.token_ids is None else len(choice.token_ids)
        completion.tokens_at += [now] * num_tokens
    if event.usage is not None:
        completion.num_tokens = event.usage.get("completion_tokens", 0)
        details = event.usage.get("prompt_tokens_details") or {}
        completion.num_cached_tokens = details.get("cached_tokens")


async def read_refusal(response: aiohttp.ClientResponse) -> str:
    """Return status and message of an answer whose status is not 200."""
    text = await response.text(errors="replace")
    try:
        body = msgspec.json.decode(text)
    except msgspec.DecodeError:
        body = text
    error = body.get("error", body) if isinstance(body, dict) else body
    return f"HTTP {response.status}: {_message(error) or response.reason}"


def _message(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:_MAX_REASON_LENGTH].strip()


def describe_failure(error: aiohttp.ClientError | TimeoutError) -> str:
    """Return a failure as text: ``Connection refused``."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno:
        # Failures of name resolution have negative numbers, which os.strerror does not know.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__
