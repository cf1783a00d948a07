"""Turns the chunks of all prompts into a stream or one answer for the client.

The router sets ids, model and creation time. The choices of prompt ``p`` are numbered ``p * n`` to
``p * n + n - 1``.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from pdlaunch.http.errors import json_response
from pdlaunch.http.headers import ROUTE_HEADER, ignored_fields_header
from pdlaunch.http.sse import DONE, ClientStream, encode_event
from pdlaunch.observe.metrics import RequestClock, RequestMetrics
from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage
from pdlaunch.router.client_request import ClientRequest, PromptRequest, StreamFields
from pdlaunch.router.continuation import Transcript
from pdlaunch.router.engine_client import Chunk
from pdlaunch.router.policy import Route
from pdlaunch.router.request_history import RequestRecord

MAX_TOLD_ROUTES = 4  # the routes header has the routes of at most this many prompts
_HEAD = ("id", "object", "created", "model", "choices")


@dataclass(eq=False)
class ClientAnswer:
    """Numbers and counts the chunks of one request; streams them, or merges them without one."""

    _request: ClientRequest
    _metrics: RequestMetrics
    record: RequestRecord
    _stream: ClientStream | None

    def __post_init__(self) -> None:
        request, endpoint = self._request, self._request.endpoint
        options = request.fields.stream_options or StreamFields()
        self._has_usage = bool(options.include_usage)  # the last chunk of a stream has the usage
        # Each chunk of a stream has the usage so far.
        self._is_continuous = self._has_usage and bool(options.continuous_usage_stats)
        self.takes_tokens = self._stream is not None and not self._is_continuous
        self._clock = self.record.clock = RequestClock(self._metrics)
        self._head = {
            "id": endpoint.id_prefix + request.request_id,
            "object": endpoint.chunk_object if self._stream else endpoint.answer_object,
            "created": int(time.time()),
            "model": request.model,
        }
        self.routes: dict[int, Route] = {}  # by index of the prompt
        self.ignored_fields: dict[str, None] = {}
        self._sends_ids = bool(request.fields.return_token_ids)
        self._held: list[bytes] = []  # events that go out with the next one
        self._choices: dict[int, dict[str, Any]] = {}
        self._extra: dict[str, Any] = {}

    async def chunk(
        self, prompt: PromptRequest, transcript: Transcript, chunk: Chunk, more_follows: bool
    ) -> None:
        """Pass on one chunk that is new to the client.

        ``more_follows``: the next chunk is here already, so this one may be sent with it. The
        caller calls ``flush`` if the next chunk has nothing new.
        """
        for choice in chunk["choices"]:
            choice["index"] += prompt.index * prompt.num_choices
            if num_tokens := len(choice.get("token_ids") or ()):
                self._clock.tokens(choice["index"], num_tokens)
            if (reason := choice.get("finish_reason")) is not None:
                self._metrics.finished(reason)
                self.record.finish_reasons[reason] = None
        if not self._sends_ids:
            for part in (chunk, *chunk["choices"]):
                part.pop("prompt_token_ids", None)
                part.pop("token_ids", None)
        if self._stream is None:
            self._extra |= {name: value for name, value in chunk.items() if name not in _HEAD}
            for choice in chunk["choices"]:
                merge(self._choices.setdefault(choice["index"], {}), choice)
            return
        chunk |= self._head
        if not self._sends_ids:
            chunk["choices"] = [one for one in chunk["choices"] if _says_something(one)]
        if self._has_usage:
            chunk["usage"] = transcript.usage() if self._is_continuous else None
        if chunk["choices"]:
            if not self._stream.has_begun:
                self._stream.response.headers.update(self._headers())
            self._held.append(encode_event(chunk))
        if not more_follows:
            await self.flush()

    async def tokens(self, chunk: Chunk, num_tokens: int, more_follows: bool) -> None:
        """Send tokens of choice 0 of prompt 0: a cheaper ``chunk``, if ``takes_tokens`` is true."""
        assert self._stream is not None
        self._clock.tokens(0, num_tokens)
        chunk |= self._head
        if not self._sends_ids:
            del chunk["choices"][0]["token_ids"]
        if self._has_usage:
            chunk["usage"] = None
        event = encode_event(chunk)
        if more_follows or self._held:
            self._held.append(event)
            if not more_follows:
                await self.flush()
        else:
            await self._stream.write(event)

    async def flush(self) -> None:
        if self._held and self._stream is not None:
            held, self._held = self._held, []
            await self._stream.write(b"".join(held))

    async def finish(self, transcripts: Sequence[Transcript]) -> web.StreamResponse:
        usage = self.record.usage = _total_usage(transcripts)
        self._clock.end(usage.completion_tokens)
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.prompt_length.observe(usage.prompt_tokens)
        if self._stream is not None:
            if self._has_usage:
                self._held.append(encode_event(self._head | {"choices": [], "usage": usage}))
            await self._stream.end(b"".join([*self._held, DONE]))
            return self._stream.response
        choices = [self._choices[index] for index in sorted(self._choices)]
        if self._request.endpoint.is_chat:
            choices = [_as_message(choice) for choice in choices]
        whole = self._extra | self._head | {"choices": choices, "usage": usage}
        return json_response(whole, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        headers = ignored_fields_header(self.ignored_fields)
        told = [self.routes[index] for index in sorted(self.routes)][:MAX_TOLD_ROUTES]
        if told:
            headers[ROUTE_HEADER] = ", ".join(
                f'{route.name}; kind={route.kind}; reason="{route.reason}"' for route in told
            )
        return headers


def _total_usage(transcripts: Sequence[Transcript]) -> Usage:
    usages = [transcript.usage() for transcript in transcripts]
    if len(usages) == 1:
        return usages[0]
    details = (usage.prompt_tokens_details for usage in usages)
    cached = [each.cached_tokens or 0 for each in details if each is not None]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(sum(cached)) if cached else None,
    )


def merge(target: dict[str, Any], update: dict[str, Any]) -> None:
    """Merge a part of a chunk into ``target``: append texts and lists, merge objects and list items
    of the same ``index`` (tool calls), replace other values.
    """
    for name, value in update.items():
        there = target.get(name)
        if there is None or value is None:
            target[name] = there if value is None else value
        elif isinstance(value, dict) and isinstance(there, dict):
            merge(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            for item in value:
                index = item.get("index") if isinstance(item, dict) else None
                same = (old for old in there if index is not None and old.get("index") == index)
                if (twin := next(same, None)) is None:
                    there.append(item)
                else:
                    merge(twin, item)
        elif isinstance(value, str) and name not in ("role", "finish_reason", "type", "id"):
            target[name] = f"{there}{value}"
        else:
            target[name] = value


def _as_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": None} | choice.pop("delta", {})
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
        message["content"] = message["content"] or None
    return {"index": choice.pop("index"), "message": message} | choice


def _says_something(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("finish_reason") is not None or choice.get("logprobs"):
        return True
    delta = choice.get("delta") or {}
    return "role" in delta or any(delta.values())
