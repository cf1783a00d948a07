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
_FORMS = ("input_length", "conversations", "messages")


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one request of a trace; a conversation is not tokenized yet."""

    prompt: list[dict[str, str]] | list[int] = []
    """The messages or token ids; empty: the tokens are made of ``hash_ids``."""
    output: int | str
    """Number of tokens, or the recorded answer."""
    num_tokens: int = 0
    """Length of a prompt that has no messages."""
    hash_ids: Sequence[int] = ()
    at_s: float | None = None
    """Seconds since the first request."""
    number: int = 0
    """Place in the trace."""

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
