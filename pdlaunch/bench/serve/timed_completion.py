"""Sends one streamed completion of token ids and records when each of its tokens reached this
client.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterable, Callable, Sequence
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec

_MAX_REASON_LENGTH = 300


class TimedCompletion(msgspec.Struct):
    """Records one completion; times are instants of ``time.perf_counter``."""

    start_at: float
    """Instant just before the request is written."""
    tokens_at: list[float] = []
    """Instant at which the bytes that tell of an output token were read; tokens that came in one
    read have the same.
    """
    token_ids: list[int] = []
    """Output tokens; empty where the deployment does not tell them."""
    num_tokens: int = 0
    """Output tokens as the deployment counts them."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens that were not computed, where the deployment says so."""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Return the time from the request to the first token."""
        return self.tokens_at[0] - self.start_at

    @property
    def first_gap_s(self) -> float:
        """Return the time from the first token to the second; KV blocks move in it, with prefill
        and decode apart.
        """
        return self.tokens_at[1] - self.tokens_at[0]

    @property
    def e2e_s(self) -> float:
        """Return the time from the request to the last token."""
        return self.tokens_at[-1] - self.start_at

    @property
    def all_gaps_s(self) -> list[float]:
        """Return the times between all tokens."""
        return [late - early for early, late in pairwise(self.tokens_at)]

    @property
    def inter_token_s(self) -> list[float]:
        """Return the times between tokens from the second on, so without the first gap."""
        return [late - early for early, late in pairwise(self.tokens_at[1:])]


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    """Holds the part of a chunk that matters; the rest is not even decoded."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)


async def complete(
    session: aiohttp.ClientSession, model: str, prompt: Sequence[int], output_tokens: int
) -> TimedCompletion:
    """Ask for exactly ``output_tokens`` greedy tokens; whatever goes wrong stands in ``error``."""
    body = msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            # Text of a token may be held back with half a character; its id is not.
            "return_token_ids": True,
        }
    )
    completion = TimedCompletion(start_at=time.perf_counter(), num_prompt_tokens=len(prompt))
    try:
        async with session.post(
            "/v1/completions", data=body, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                completion.error = await read_refusal(response)
            else:
                await read_stream(response.content.iter_any(), completion)
    except (aiohttp.ClientError, TimeoutError) as error:
        completion.error = describe_failure(error)
    except msgspec.MsgspecError as error:
        completion.error = f"an event that is not of the OpenAI form: {error}"
    if completion.error is None:
        completion.error = _what_is_missing(completion, output_tokens)
    return completion


async def read_stream(
    pieces: AsyncIterable[bytes],
    completion: TimedCompletion,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Read server-sent events, in the pieces in which they came.

    All events of one piece get its time, and not that of our own work on the events before them.
    Raises msgspec.MsgspecError.
    """
    rest = b""
    async for piece in pieces:
        now = clock()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                if line.strip() == b"data: [DONE]":
                    return
                _take(_event_decoder.decode(line[5:]), now, completion)
    completion.error = completion.error or "the stream ended without [DONE]"


def _take(event: _Event, now: float, completion: TimedCompletion) -> None:
    if event.error is not None:
        completion.error = f"in the stream: {_message(event.error)}"
    for choice in event.choices:
        # Who does not know token ids sends one token a chunk.
        num_tokens = 1 if choice.token_ids is None else len(choice.token_ids)
        completion.tokens_at += [now] * num_tokens
        completion.token_ids += choice.token_ids or ()
    if event.usage is not None:
        completion.num_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        completion.num_cached_tokens = None if details is None else details.cached_tokens


def _what_is_missing(completion: TimedCompletion, output_tokens: int) -> str | None:
    if completion.num_tokens != output_tokens:
        return f"{completion.num_tokens} tokens instead of {output_tokens}"
    if not completion.tokens_at:
        return "no chunk with a token"
    return None


async def read_refusal(response: aiohttp.ClientResponse) -> str:
    """Return status and message of an answer that is not 200."""
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
    """Describe a failure for people: ``Connection refused`` and not what the client library keeps
    of the attempt.
    """
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno:
        # Names that cannot be resolved have negative numbers, which the system has no words for.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__
