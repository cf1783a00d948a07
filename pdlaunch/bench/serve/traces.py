"""Requests that a file tells of: Mooncake's published traces, and conversations like ShareGPT's.

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
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from pdlaunch.bench.serve.target import BenchTarget
from pdlaunch.bench.serve.timed_completion import describe_failure, read_refusal
from pdlaunch.errors import ConfigError, PdlaunchError

HASHED_TOKENS = 512
"""Tokens that one of ``hash_ids`` stands for."""
_AT_ONCE = 8
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


class HashedPrompt(msgspec.Struct, frozen=True):
    """Describes a prompt by its length and by what it has in common with others."""

    num_tokens: int
    hash_ids: Sequence[int]


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one request of a trace; a conversation is not tokenized yet."""

    prompt: HashedPrompt | list[dict[str, str]] | list[int]
    output: int | str
    """Number of tokens, or the recorded answer."""
    at_s: float | None = None
    """Seconds since the first request."""
    number: int = 0
    """Place in the trace."""


class _Mooncake(msgspec.Struct):
    input_length: int
    output_length: int
    timestamp: float | None = None
    hash_ids: list[int] = []


class _Message(msgspec.Struct):
    role: str = msgspec.field(name="from")
    content: str = msgspec.field(name="value")


class _OpenAIMessage(msgspec.Struct):
    role: str
    content: str


class _ShareGPT(msgspec.Struct):
    conversations: list[_Message]
    timestamp: float | None = None


class _OpenAI(msgspec.Struct):
    messages: list[_OpenAIMessage]
    timestamp: float | None = None


def read_trace_file(path: Path) -> list[TraceRequest]:
    """Read a trace in order of time. Raises ConfigError that names line and member."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}") from None
    requests = list(
        chain.from_iterable(_read(path, *numbered) for numbered in _records(text, path))
    )
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


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a file, each with its place in words."""
    if text.lstrip().startswith("["):
        try:
            records = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"--trace {path}: no JSON: {error}") from None
        yield from ((f"entry {number}", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"--trace {path}: line {number}: no JSON: {error}") from None


def _read(path: Path, place: str, record: Any) -> Iterator[TraceRequest]:
    kinds: dict[str, type[_Mooncake | _ShareGPT | _OpenAI]] = {
        "input_length": _Mooncake,
        "conversations": _ShareGPT,
        "messages": _OpenAI,
    }
    name = next((name for name in kinds if isinstance(record, dict) and name in record), None)
    if name is None:
        raise ConfigError(
            f"--trace {path}: {place} has none of {', '.join(kinds)}",
            fix="give a trace of Mooncake's form, or conversations of ShareGPT's or OpenAI's",
        )
    try:
        found = msgspec.convert(record, kinds[name])
    except msgspec.ValidationError as error:
        raise ConfigError(f"--trace {path}: {place}: {error}") from None
    at_s = None if found.timestamp is None else found.timestamp / 1000
    if isinstance(found, _Mooncake):
        if found.input_length < 1 or found.output_length < 1:
            raise ConfigError(
                f"--trace {path}: {place}: input_length and output_length must be 1 or more"
            )
        prompt = HashedPrompt(found.input_length, found.hash_ids)
        yield TraceRequest(prompt=prompt, output=found.output_length, at_s=at_s)
        return
    said = found.conversations if isinstance(found, _ShareGPT) else found.messages
    messages: list[dict[str, str]] = []
    for message in said:
        role = _ROLES.get(message.role, message.role)
        if role == "assistant" and messages and message.content:
            yield TraceRequest(prompt=messages.copy(), output=message.content, at_s=at_s)
        messages.append({"role": role, "content": message.content})


async def tokenize(target: BenchTarget, requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Return the requests with the token ids of conversations, which the deployment tells.

    Raises PdlaunchError when it does not.
    """
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(request: TraceRequest) -> TraceRequest:
        if not isinstance(request.prompt, list) or not isinstance(request.output, str):
            return request
        async with places:
            prompt = await _ask(target, {"messages": request.prompt, "add_generation_prompt": True})
            answer = await _ask(target, {"prompt": request.output, "add_special_tokens": False})
        return msgspec.structs.replace(request, prompt=prompt, output=max(1, len(answer)))

    return list(await asyncio.gather(*map(one, requests)))


async def _ask(target: BenchTarget, question: dict[str, Any]) -> list[int]:
    try:
        async with target.session.post(
            "/tokenize", json={"model": target.model} | question
        ) as response:
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


def num_prompt_tokens(request: TraceRequest) -> int:
    """Return the length of a prompt, which is known of a conversation once it is tokenized."""
    if isinstance(request.prompt, HashedPrompt):
        return request.prompt.num_tokens
    return len(request.prompt)


def wanted_tokens(request: TraceRequest) -> int:
    """Return how many tokens to ask for; known of a conversation once it is tokenized."""
    return request.output if isinstance(request.output, int) else len(request.output)


def prompt_tokens(request: TraceRequest, token_ids: range, seed: int) -> list[int]:
    """Return the prompt's token ids; those that stand for a hash are made of it and the seed."""
    if not isinstance(request.prompt, HashedPrompt):
        return [token for token in request.prompt if isinstance(token, int)]
    num_tokens, tokens = request.prompt.num_tokens, list[int]()
    for hash_id in request.prompt.hash_ids[: -(-num_tokens // HASHED_TOKENS)]:
        tokens += random.Random(f"{seed}/{hash_id}").choices(token_ids, k=HASHED_TOKENS)
    rest = random.Random(f"{seed}/of {request.number}")
    return (tokens + rest.choices(token_ids, k=max(0, num_tokens - len(tokens))))[:num_tokens]
