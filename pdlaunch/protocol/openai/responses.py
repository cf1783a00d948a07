"""Defines answers and stream chunks. Fields that are ``UNSET`` are left out of the JSON."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

# Holds the ``SpanReport`` in an answer, or in an event before the end of a stream, for a router
# that has asked for it
REPORT_KEY = "pdlaunch"


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None  # not computed for this request
    created_cache_tokens: int | UnsetType | None = UNSET
    multimodal_tokens: dict[str, int] | UnsetType | None = UNSET


class Usage(msgspec.Struct, kw_only=True):
    """Counts the tokens of a request over all prompts and choices; a prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    # Of other engines: reasoning tokens and the like.
    completion_tokens_details: dict[str, Any] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """A token that is no valid UTF-8 reads ``bytes:`` and its bytes in hexadecimal."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(msgspec.Struct, kw_only=True):
    """Holds the token that was drawn, with the most probable ones, or one of these."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] | UnsetType = UNSET


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob] | None = None
    refusal: None = None


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


# Of each token of the prompt, by token ids; nothing predicts the first one
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AnyChoice(msgspec.Struct, kw_only=True):
    """Holds what all choices of answers and chunks have.

    With ``return_token_ids``, ``token_ids`` are those of this answer or chunk.
    """

    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET


class CompletionChoice(AnyChoice, kw_only=True):
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class CalledTool(msgspec.Struct, kw_only=True):
    """Holds a tool call, or what a chunk adds to the one with this ``index``."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction


class ChatText(msgspec.Struct, kw_only=True):
    """Holds the answer's message, or what a chunk adds to it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChatChoice(AnyChoice, kw_only=True):
    message: ChatText | UnsetType = UNSET  # of an answer
    delta: ChatText | UnsetType = UNSET  # of a chunk
    logprobs: ChatLogprobs | None = None


class AnyAnswer(msgspec.Struct, kw_only=True):
    id: str
    created: int = 0
    model: str = ""
    usage: Usage | UnsetType | None = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType | None = UNSET


class Completion(AnyAnswer, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice] = []


class ChatCompletion(AnyAnswer, kw_only=True):
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    choices: list[ChatChoice] = []
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pdlaunch"
    root: str | None = None
    parent: str | UnsetType | None = UNSET  # the model that an adapter changes
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard] = []
