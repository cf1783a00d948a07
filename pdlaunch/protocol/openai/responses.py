"""Defines answers and stream chunks, encoded and decoded by msgspec.

They read what vLLM writes as well: members that we do not know are dropped, those that others leave
out have defaults. ``UNSET`` members are not written.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pdlaunch.protocol.costs import EngineReport

REPORT_KEY = "pdlaunch"
"""Holds the ``SpanReport`` in an answer, or in an event before the end of a stream, for a router
that has asked for it.
"""
WORK_KEY = "pdlaunch_work"
"""Holds the ``EngineReport`` in an answer or a chunk, for a router of ours."""


class PromptTokensDetails(msgspec.Struct):
    """Tells how much of the prompt was not computed for this request."""

    cached_tokens: int | None = None
    created_cache_tokens: int | UnsetType | None = UNSET
    multimodal_tokens: dict[str, int] | UnsetType | None = UNSET


class Usage(msgspec.Struct, kw_only=True):
    """Counts the tokens of a request over all prompts and choices; a prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: dict[str, Any] | UnsetType = UNSET
    """Filled in by engines that tell more than we do: reasoning tokens and the like."""


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Holds the log probabilities of the completions API.

    A token that is no valid UTF-8 reads ``bytes:`` and its bytes in hexadecimal.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, kw_only=True):
    """Holds one alternative at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob, kw_only=True):
    """Holds the token that was drawn, and the most probable ones."""

    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Holds the log probabilities of the chat API."""

    content: list[TokenLogprob] | None = None
    refusal: None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    """Holds a choice of an answer or of a chunk.

    With ``return_token_ids``, ``token_ids`` are those of this answer or chunk.
    """

    index: int = 0
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Answers /v1/completions; with ``usage`` UNSET it is a chunk of the stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = 0
    model: str = ""
    choices: list[CompletionChoice] = []
    usage: Usage | UnsetType | None = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType | None = UNSET
    pdlaunch_work: EngineReport | UnsetType = UNSET
    """Tells a router of ours what the engine has to do."""


class AssistantMessage(msgspec.Struct, kw_only=True):
    """Holds the answer's message."""

    role: str = "assistant"
    content: str | None = None
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """Holds one choice of an answer."""

    index: int = 0
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Answers /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = 0
    model: str = ""
    choices: list[ChatChoice] = []
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType | None = UNSET
    pdlaunch_work: EngineReport | UnsetType = UNSET
    """Tells a router of ours what the engine has to do."""


class ChatDelta(msgspec.Struct, kw_only=True):
    """Says what a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """Holds one choice of a chunk; ``token_ids`` are those of this chunk."""

    index: int = 0
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """Holds a chunk of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[ChatChunkChoice] = []
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType | None = UNSET
    pdlaunch_work: EngineReport | UnsetType = UNSET
    """Tells a router of ours what the engine has to do."""


class ModelCard(msgspec.Struct, kw_only=True):
    """Describes one model of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pdlaunch"
    root: str | None = None
    parent: str | UnsetType | None = UNSET
    """The model that an adapter changes."""
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    """Answers /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard] = []
