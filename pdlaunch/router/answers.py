"""Turns the chunks of all prompts into a stream or one answer for the client.

Ids, model and creation time are the router's own. The choices of prompt ``p`` are numbered
``p * n`` to ``p * n + n - 1``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
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
MAX_TOLD_LEFT_OUT = 4  # engines that were left out, of each of these
_HEAD = ("id", "object", "created", "model", "choices")


class ClientAnswer:
    """Numbers and counts the chunks of one request."""

    def __init__(
        self, request: ClientRequest, model: str, metrics: RequestMetrics, record: RequestRecord
    ) -> None:
        self._request = request
        self._metrics = metrics
        self._record = record
        self._clock = RequestClock(metrics)
        record.clock = self._clock
        self._id = request.endpoint.id_prefix + request.request_id
        self._model = model
        self._created = int(time.time())
        self._routes: dict[int, Route] = {}
        self._ignored_fields = dict.fromkeys(request.ignored_fields)

    @property
    def ignored_fields(self) -> Iterable[str]:
        return self._ignored_fields

    def ignores(self, names: Iterable[str]) -> None:
        self._ignored_fields |= dict.fromkeys(names)

    def routed(self, prompt: PromptRequest, route: Route) -> None:
        self._routes[prompt.index] = route

    def headers(self) -> dict[str, str]:
        told = [_tell_route(self._routes[index]) for index in sorted(self._routes)]
        return {ROUTE_HEADER: ", ".join(told[:MAX_TOLD_ROUTES])} if told else {}

    async def chunk(
        self, prompt: PromptRequest, transcript: Transcript, chunk: Chunk, *, more_follows: bool
    ) -> None:
        """Pass on one chunk that the client has not had yet.

        ``more_follows``: the next one is here already, so that both may be sent together; else
        ``flush`` comes when nothing of it is new.
        """
        if prompt.index:
            for choice in chunk["choices"]:
                choice["index"] += prompt.index * prompt.num_choices
        self._observe(chunk)
        await self._take(transcript, chunk, more_follows=more_follows)

    async def flush(self) -> None:
        """Send what was held back for the next chunk."""

    @property
    def takes_tokens(self) -> bool:
        """Return whether ``tokens`` may be called."""
        return False

    async def tokens(self, chunk: Chunk, num_tokens: int, *, more_follows: bool) -> None:
        """Take tokens of the first choice of the first prompt."""
        raise NotImplementedError

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        raise NotImplementedError

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _observe(self, chunk: Chunk) -> None:
        for choice in chunk["choices"]:
            if num_tokens := len(choice.get("token_ids") or ()):
                self._clock.tokens(choice["index"], num_tokens)
            if choice.get("finish_reason") is not None:
                self._metrics.finished(choice["finish_reason"])
                self._record.finish_reasons[choice["finish_reason"]] = None
            if self._record.content is not None:
                delta = choice.get("delta") or {}
                self._record.says(choice.get("text") or delta.get("content") or "")

    def _observe_end(self, usage: Usage) -> None:
        self._clock.end(usage.completion_tokens)
        self._record.usage = usage
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.prompt_length.observe(usage.prompt_tokens)


class StreamedAnswer(ClientAnswer):
    """Sends events as they come."""

    def __init__(
        self,
        request: ClientRequest,
        model: str,
        metrics: RequestMetrics,
        record: RequestRecord,
        stream: ClientStream,
        ignored: IgnoredFields,
    ) -> None:
        super().__init__(request, model, metrics, record)
        self._stream = stream
        self._ignored = ignored
        self._chunk_head = self._head(request.endpoint.chunk_object)
        self._has_begun = False
        self._tells_ids, self._tells_usage = request.return_token_ids, request.include_usage
        self._held: list[bytes] = []
        """Events that go out with the next one."""

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        chunk |= self._chunk_head
        if not self._tells_ids:
            _drop_token_ids(chunk)
        if self._tells_usage:
            chunk["usage"] = transcript.usage() if self._request.continuous_usage else None
        if not chunk["choices"]:
            if not more_follows:
                await self.flush()
            return
        if not self._has_begun:
            self._has_begun = True
            if not self._stream.has_begun:
                self._stream.add_headers(
                    self._ignored.headers(self.ignored_fields) | self.headers()
                )
        event = encode_event(chunk)
        if more_follows:
            self._held.append(event)
        else:
            await self._stream.write(self._with_held(event))

    @property
    def takes_tokens(self) -> bool:
        """Return whether ``tokens`` may be called."""
        return not self._request.continuous_usage and self._record.content is None

    async def tokens(self, chunk: Chunk, num_tokens: int, *, more_follows: bool) -> None:
        """Take tokens of the first choice of the first prompt."""
        self._clock.tokens(0, num_tokens)
        chunk |= self._chunk_head
        if not self._tells_ids:
            del chunk["choices"][0]["token_ids"]
        if self._tells_usage:
            chunk["usage"] = None
        event = encode_event(chunk)
        if more_follows:
            self._held.append(event)
        else:
            await self._stream.write(self._with_held(event) if self._held else event)

    async def finish(self, transcripts: Iterable[Transcript]) -> None:
        usage = total_usage(transcripts)
        last = b""
        if self._request.include_usage:
            last = encode_event(self._chunk_head | {"choices": [], "usage": usage})
        await self._stream.end(self._with_held(last + DONE))
        self._observe_end(usage)

    async def fail(self, error: BaseException) -> None:
        await self.flush()
        await self._stream.fail(error)

    async def flush(self) -> None:
        """Send what was held back for the next chunk."""
        if self._held:
            await self._stream.write(self._with_held(b""))

    def _with_held(self, event: bytes) -> bytes:
        if not self._held:
            return event
        held, self._held = self._held, []
        return b"".join([*held, event])


class WholeAnswer(ClientAnswer):
    """Puts one JSON object together from the chunks."""

    def __init__(
        self, request: ClientRequest, model: str, metrics: RequestMetrics, record: RequestRecord
    ) -> None:
        super().__init__(request, model, metrics, record)
        self._choices: dict[int, dict[str, Any]] = {}
        self._extra: dict[str, Any] = {}

    async def _take(self, transcript: Transcript, chunk: Chunk, *, more_follows: bool) -> None:
        if not self._request.return_token_ids:
            _drop_token_ids(chunk, keep_empty=True)
        self._extra |= {name: value for name, value in chunk.items() if name not in _HEAD}
        for choice in chunk["choices"]:
            merge(self._choices.setdefault(choice["index"], {}), choice)

    def finish(self, transcripts: Iterable[Transcript]) -> dict[str, Any]:
        usage = total_usage(transcripts)
        self._observe_end(usage)
        choices = [self._choices[index] for index in sorted(self._choices)]
        if self._request.endpoint.is_chat:
            choices = [_as_message(choice) for choice in choices]
        return (
            self._extra
            | self._head(self._request.endpoint.answer_object)
            | {"choices": choices, "usage": usage}
        )


def _tell_route(route: Route) -> str:
    told = f"{route.name}; kind={route.kind}"
    if route.left_out:
        names = sorted(route.left_out)[:MAX_TOLD_LEFT_OUT]
        reasons = ", ".join(f"{name}: {route.left_out[name]}" for name in names)
        told += f'; left_out="{reasons}"'
    return told


def total_usage(transcripts: Iterable[Transcript]) -> Usage:
    """Return the sum over all prompts of a request."""
    usages = [transcript.usage() for transcript in transcripts]
    if len(usages) == 1:
        return usages[0]
    cached = [
        usage.prompt_tokens_details.cached_tokens or 0
        for usage in usages
        if usage.prompt_tokens_details is not None
    ]
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
        elif (
            isinstance(value, str)
            and isinstance(there, str)
            and name not in ("role", "finish_reason", "type", "id")
        ):
            target[name] = there + value
        elif isinstance(value, dict) and isinstance(there, dict):
            merge(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            _merge_lists(there, value)
        else:
            target[name] = value


def _merge_lists(target: list[Any], news: list[Any]) -> None:
    for item in news:
        index = item.get("index") if isinstance(item, dict) else None
        twin = next(
            (old for old in target if index is not None and old.get("index") == index), None
        )
        if twin is None:
            target.append(item)
        else:
            merge(twin, item)


def _as_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": None} | choice.pop("delta", {})
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
    return {"index": choice.pop("index"), "message": message} | choice


def _drop_token_ids(chunk: Chunk, *, keep_empty: bool = False) -> None:
    """Take out what the client did not ask for, and the choices that then say nothing."""
    chunk.pop("prompt_token_ids", None)
    for choice in chunk["choices"]:
        choice.pop("prompt_token_ids", None)
        choice.pop("token_ids", None)
    if not keep_empty:
        chunk["choices"] = [choice for choice in chunk["choices"] if _says_something(choice)]


def _says_something(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("finish_reason") is not None or choice.get("logprobs"):
        return True
    delta = choice.get("delta") or {}
    return "role" in delta or any(delta.values())
