"""Writes answers and stream chunks of the two completion APIs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from pdlaunch.engine.server.choice import Delta
from pdlaunch.engine.server.engine_reports import EngineReports
from pdlaunch.engine.server.tokenizer import TextTokenizer
from pdlaunch.protocol.engine import TokenOutput
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.openai.requests import GenerationRequest
from pdlaunch.protocol.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

_LOWEST = -9999.0
"""JSON has no minus infinity; the value that OpenAI uses."""


def completion_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> CompletionLogprobs:
    """Return the log probabilities of a delta's tokens.

    The drawn token is always among the top ones, so there may be ``num_top + 1``.
    """
    return CompletionLogprobs(
        tokens=[token_name(tokenizer.token_bytes(token.token_id)) for token in delta.tokens],
        token_logprobs=[
            None if token.logprob is None else max(token.logprob, _LOWEST) for token in delta.tokens
        ],
        top_logprobs=[
            _top_by_name(token, tokenizer, num_top) if num_top else None for token in delta.tokens
        ],
        text_offset=list(delta.text_offsets),
    )


def chat_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> ChatLogprobs:
    """Return the log probabilities of a delta's tokens, with their bytes."""
    return ChatLogprobs(
        content=[_token_logprob(token, tokenizer, num_top) for token in delta.tokens]
    )


def token_name(token_bytes: bytes) -> str:
    """Return the token's text; ``bytes:\\xe4\\xbd`` where it is no whole character."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _top_by_name(token: TokenOutput, tokenizer: TextTokenizer, num_top: int) -> dict[str, float]:
    top = dict(token.top_logprobs[:num_top])
    if token.logprob is not None:
        top.setdefault(token.token_id, token.logprob)
    return {
        token_name(tokenizer.token_bytes(token_id)): max(logprob, _LOWEST)
        for token_id, logprob in top.items()
    }


def _token_logprob(token: TokenOutput, tokenizer: TextTokenizer, num_top: int) -> TokenLogprob:
    token_bytes = tokenizer.token_bytes(token.token_id)
    return TokenLogprob(
        token=token_name(token_bytes),
        logprob=_LOWEST if token.logprob is None else max(token.logprob, _LOWEST),
        bytes=list(token_bytes),
        top_logprobs=[
            _top_logprob(token_id, logprob, tokenizer)
            for token_id, logprob in token.top_logprobs[:num_top]
        ],
    )


def _top_logprob(token_id: int, logprob: float, tokenizer: TextTokenizer) -> TopLogprob:
    token_bytes = tokenizer.token_bytes(token_id)
    return TopLogprob(
        token=token_name(token_bytes), logprob=max(logprob, _LOWEST), bytes=list(token_bytes)
    )


KVParams = dict[str, Any]


class Renderer(ABC):
    """Writes one request's answer, or its stream."""

    PREFIX: str
    """Begins the answer's id."""

    def __init__(
        self,
        request: GenerationRequest,
        hop_id: HopId,
        model: str,
        tokenizer: TextTokenizer,
        prompts: Sequence[list[int]],
        reports: EngineReports | None = None,
    ) -> None:
        """``reports``: what routers are told of the engine; None: it is none of ours that asks."""
        self.request = request
        self._reports = reports or EngineReports()
        self.id = f"{self.PREFIX}{hop_id}"
        self.created = int(time.time())
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts

    @abstractmethod
    def opening(self, usage: Usage | UnsetType) -> list[object]:
        """Return the chunks before any text."""

    @abstractmethod
    def chunk(self, delta: Delta, usage: Usage | UnsetType) -> object:
        """Return a chunk of the stream."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> object:
        """Return the last chunk of a stream with include_usage; it has no choices."""

    @abstractmethod
    def answer(
        self, deltas: Sequence[Delta], usage: Usage, kv_transfer_params: KVParams | UnsetType | None
    ) -> object:
        """Return the whole answer; ``deltas`` hold everything of each choice."""

    def token_ids(self, delta: Delta) -> list[int] | UnsetType:
        """Return the ids that belong to the delta's text, UNSET without return_token_ids."""
        return (
            [token.token_id for token in delta.tokens] if self.request.return_token_ids else UNSET
        )


class CompletionRenderer(Renderer):
    """Writes answers of /v1/completions."""

    PREFIX = "cmpl-"

    def opening(self, usage: Usage | UnsetType) -> list[object]:
        if not self.request.return_token_ids:
            return []
        choices = [
            self._choice(Delta(index * self.request.n)) for index in range(len(self.prompts))
        ]
        for choice, prompt in zip(choices, self.prompts, strict=True):
            choice.prompt_token_ids = prompt
        return [self._completion(choices, usage)]

    def chunk(self, delta: Delta, usage: Usage | UnsetType) -> object:
        completion = self._completion([self._choice(delta)], usage)
        completion.pdlaunch_work = self._reports.unheard()
        return completion

    def usage_chunk(self, usage: Usage) -> object:
        completion = self._completion([], usage)
        completion.pdlaunch_work = self._reports.latest()
        return completion

    def answer(
        self, deltas: Sequence[Delta], usage: Usage, kv_transfer_params: KVParams | UnsetType | None
    ) -> object:
        choices = [self._choice(delta) for delta in deltas]
        if self.request.return_token_ids:
            for choice in choices:
                choice.prompt_token_ids = self.prompts[choice.index // self.request.n]
        completion = self._completion(choices, usage)
        completion.pdlaunch_work = self._reports.latest()
        completion.kv_transfer_params = kv_transfer_params
        return completion

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType = UNSET
    ) -> Completion:
        return Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def _choice(self, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self.token_ids(delta),
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        num_top = self.request.num_top_logprobs
        return (
            completion_logprobs(delta, self.tokenizer, num_top)
            if num_top is not None and delta.tokens
            else None
        )


class ChatRenderer(Renderer):
    """Writes answers of /v1/chat/completions."""

    PREFIX = "chatcmpl-"

    def opening(self, usage: Usage | UnsetType) -> list[object]:
        choices = [
            ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
            for index in range(self.request.n)
        ]
        chunk = self._chunk(choices, usage)
        if self.request.return_token_ids:
            (chunk.prompt_token_ids,) = self.prompts
        return [chunk]

    def chunk(self, delta: Delta, usage: Usage | UnsetType) -> object:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text)
            if delta.text or not delta.finish_reason
            else ChatDelta(),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self.token_ids(delta),
        )
        chunk = self._chunk([choice], usage)
        chunk.pdlaunch_work = self._reports.unheard()
        return chunk

    def usage_chunk(self, usage: Usage) -> object:
        chunk = self._chunk([], usage)
        chunk.pdlaunch_work = self._reports.latest()
        return chunk

    def answer(
        self, deltas: Sequence[Delta], usage: Usage, kv_transfer_params: KVParams | UnsetType | None
    ) -> object:
        completion = ChatCompletion(id=self.id, created=self.created, model=self.model, usage=usage)
        completion.choices = [self._choice(delta) for delta in deltas]
        completion.pdlaunch_work = self._reports.latest()
        completion.kv_transfer_params = kv_transfer_params
        if self.request.return_token_ids:
            (completion.prompt_token_ids,) = self.prompts
        return completion

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType = UNSET) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        return ChatChoice(
            index=delta.index,
            message=AssistantMessage(content=delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self.token_ids(delta),
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        num_top = self.request.num_top_logprobs
        return (
            chat_logprobs(delta, self.tokenizer, num_top)
            if num_top is not None and delta.tokens
            else None
        )
