"""Turns the chunks of all prompts into a stream or one answer for the client.

Ids, model and creation time are the router's own. The choices of prompt ``p`` are numbered
``p * n`` to ``p * n + n - 1``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from pdlaunch.http.headers import ROUTE_HEADER, IgnoredFields
from pdlaunch.http.sse import DONE, ClientStream, encode_event
from pdlaunch.observe.metrics import RequestClock, RequestMetrics
from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage
from pdlaunch.router.client_request import ClientRequest, PromptRequest
from pdlaunch.router.engine_client import Chunk
from pdlaunch.router.policy import Route
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.transcript import Transcript

MAX_TOLD_ROUTES = 4  # prompts of a request whose routes stand in the header
_HEAD = ("id", "object", "created", "model", "choices")


class ClientAnswer:
    """Numbers and counts the chunks of one request. ``ignored`` names fields to the client."""

    takes_tokens = False
    """``tokens`` may be called."""

    def __init__(
        self,
        request: ClientRequest,
        model: str,
        metrics: RequestMetrics,
        record: RequestRecord,
        ignored: IgnoredFields,
    ) -> None:
        self._request = request
        self._metrics = metrics
        self._record = record
        self._clock = record.clock = RequestClock(metrics)
        self._head = {
            "id": request.endpoint.id_prefix + request.request_id,
            "created": int(time.time()),
            "model": model,
        }
        self._routes: dict[int, Route] = {}
        self._ignored = ignored
        self._ignored_names = dict.fromkeys(request.ignored_fields)

    def ignores(self, names: Iterable[str]) -> None:
        self._ignored_names |= dict.fromkeys(names)

    def routed(self, prompt: PromptRequest, route: Route) -> None:
        self._routes[prompt.index] = route

    def headers(self) -> dict[str, str]:
        headers = self._ignored.headers(self._ignored_names)
        told = [self._routes[index] for index in sorted(self._routes)][:MAX_TOLD_ROUTES]
        if told:
            headers[ROUTE_HEADER] = ", ".join(f"{route.name}; kind={route.kind}" for route in told)
        return headers

    async def chunk(
        self, prompt: PromptRequest, transcript: Transcript, chunk: Chunk, *, more_follows: bool
    ) -> None:
        """Pass on one chunk that the client has not had yet.

        ``more_follows``: the next one is here already, so that both may be sent together; else
        ``flush`` comes when nothing of it is new.
        """
        for choice in chunk["choices"]:
            choice["index"] += prompt.index * prompt.num_choices
            if num_tokens := len(choice.get("token_ids") or ()):
                self._clock.tokens(choice["index"], num_tokens)
            if (reason := choice.get("finish_reason")) is not None:
                self._metrics.finished(reason)
                self._record.finish_reasons[reason] = None
        await self._take(transcript, chunk, more_follows=more_follows)

    async def flush(self) -> None:
        """Send what was held back for the next chunk."""

    async def tokens(self, chunk: Chunk, num_tokens: int, *, more_follows: bool) -> None:
        """Take tokens of the first choice of the first prompt."""
        raise NotImplementedError

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        raise NotImplementedError

    def _total_usage(self, transcripts: Sequence[Transcript]) -> Usage:
        """Count the answer, which is whole; return the sum over all prompts."""
        usage = total_usage(transcripts)
        self._record.usage = usage
        self._clock.end(usage.completion_tokens)
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.prompt_length.observe(usage.prompt_tokens)
        return usage


class StreamedAnswer(ClientAnswer):
    """Sends events as they come."""

    def __init__(
        self,
        request: ClientRequest,
        model: str,
        metrics: RequestMetrics,
        record: RequestRecord,
        ignored: IgnoredFields,
        stream: ClientStream,
    ) -> None:
        super().__init__(request, model, metrics, record, ignored)
        self._stream = stream
        self._chunk_head = self._head | {"object": request.endpoint.chunk_object}
        self._tells_ids = bool(request.fields.return_token_ids)
        self._tells_usage = request.include_usage
        self.takes_tokens = not request.continuous_usage
        self._held: list[bytes] = []  # events that go out with the next one

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        chunk |= self._chunk_head
        if not self._tells_ids:
            _drop_token_ids(chunk)
            chunk["choices"] = [one for one in chunk["choices"] if _says_something(one)]
        if self._tells_usage:
            chunk["usage"] = transcript.usage() if self._request.continuous_usage else None
        if not chunk["choices"]:
            if not more_follows:
                await self.flush()
            return
        if not self._stream.has_begun:
            self._stream.add_headers(self.headers())
        await self._send(encode_event(chunk), more_follows=more_follows)

    async def tokens(self, chunk: Chunk, num_tokens: int, *, more_follows: bool) -> None:
        self._clock.tokens(0, num_tokens)
        chunk |= self._chunk_head
        if not self._tells_ids:
            del chunk["choices"][0]["token_ids"]
        if self._tells_usage:
            chunk["usage"] = None
        event = encode_event(chunk)
        if more_follows or self._held:
            await self._send(event, more_follows=more_follows)
        else:
            await self._stream.write(event)

    async def finish(self, transcripts: Sequence[Transcript]) -> None:
        usage, last = self._total_usage(transcripts), b""
        if self._tells_usage:
            last = encode_event(self._chunk_head | {"choices": [], "usage": usage})
        await self._stream.end(self._with_held(last + DONE))

    async def flush(self) -> None:
        if self._held:
            await self._stream.write(self._with_held(b""))

    async def _send(self, event: bytes, *, more_follows: bool) -> None:
        if more_follows:
            self._held.append(event)
        else:
            await self._stream.write(self._with_held(event))

    def _with_held(self, event: bytes) -> bytes:
        held, self._held = self._held, []
        return b"".join([*held, event])


class WholeAnswer(ClientAnswer):
    """Puts one JSON object together from the chunks."""

    def __init__(
        self,
        request: ClientRequest,
        model: str,
        metrics: RequestMetrics,
        record: RequestRecord,
        ignored: IgnoredFields,
    ) -> None:
        super().__init__(request, model, metrics, record, ignored)
        self._choices: dict[int, dict[str, Any]] = {}
        self._extra: dict[str, Any] = {}

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        if not self._request.fields.return_token_ids:
            _drop_token_ids(chunk)
        self._extra |= {name: value for name, value in chunk.items() if name not in _HEAD}
        for choice in chunk["choices"]:
            merge(self._choices.setdefault(choice["index"], {}), choice)

    def finish(self, transcripts: Sequence[Transcript]) -> dict[str, Any]:
        usage, endpoint = self._total_usage(transcripts), self._request.endpoint
        choices = [self._choices[index] for index in sorted(self._choices)]
        if endpoint.is_chat:
            choices = [_as_message(choice) for choice in choices]
        own = {"object": endpoint.answer_object, "choices": choices, "usage": usage}
        return self._extra | self._head | own


def total_usage(transcripts: Sequence[Transcript]) -> Usage:
    """Return the sum over all prompts of a request."""
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


def merge(target: dict[str, Any], news: dict[str, Any]) -> None:
    """Add a chunk's choice, or a part of it: texts and lists grow, objects merge, the rest is
    replaced. Members of a list with an ``index`` (tool calls) merge by it.
    """
    for name, value in news.items():
        there = target.get(name)
        if there is None or value is None:
            target[name] = there if value is None else value
        elif isinstance(value, dict) and isinstance(there, dict):
            merge(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            _merge_lists(there, value)
        elif (
            isinstance(value, str)
            and isinstance(there, str)
            and name not in ("role", "finish_reason", "type", "id")
        ):
            target[name] = there + value
        else:
            target[name] = value


def _merge_lists(target: list[Any], news: list[Any]) -> None:
    for item in news:
        index = item.get("index") if isinstance(item, dict) else None
        same = (old for old in target if index is not None and old.get("index") == index)
        if (twin := next(same, None)) is None:
            target.append(item)
        else:
            merge(twin, item)


def _as_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": None} | choice.pop("delta", {})
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
    return {"index": choice.pop("index"), "message": message} | choice


def _drop_token_ids(chunk: Chunk) -> None:
    """Take out what the router alone has asked for."""
    for part in (chunk, *chunk["choices"]):
        part.pop("prompt_token_ids", None)
        part.pop("token_ids", None)


def _says_something(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("finish_reason") is not None or choice.get("logprobs"):
        return True
    delta = choice.get("delta") or {}
    return "role" in delta or any(delta.values())
