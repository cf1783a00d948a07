"""Defines answers and stream chunks. The JSON leaves out fields that are ``UNSET``."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

# Member that holds the ``SpanReport``, for a router that asked for spans: in an answer, or in an
# event before the end of a stream
REPORT_KEY = "pdlaunch"


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None  # tokens that were not computed for this request
    created_cache_tokens: int | UnsetType | None = UNSET
    multimodal_tokens: dict[str, int] | UnsetType | None = UNSET


class Usage(msgspec.Struct, kw_only=True):
    """Token counts of a request over all prompts and choices; each prompt is counted once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    # Only from other engines: reasoning tokens and similar counts.
    completion_tokens_details: dict[str, Any] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """A token that is not valid UTF-8 is written as ``bytes:`` and its bytes in hexadecimal."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(msgspec.Struct, kw_only=True):
    """The token that was drawn, with the most probable tokens; or one of those."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: "list[TokenLogprob] | UnsetType" = UNSET


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob] | None = None
    refusal: None = None


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


# For each token of the prompt: token id -> logprob; None for the first, which nothing predicts
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AnyChoice(msgspec.Struct, kw_only=True):
    """The fields that all choices of answers and chunks have."""

    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET  # of the tokens in this answer or chunk


class CompletionChoice(AnyChoice, kw_only=True):
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class CalledTool(msgspec.Struct, kw_only=True):
    """A tool call, or what a chunk adds to the tool call with this ``index``."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction


class ChatText(msgspec.Struct, kw_only=True):
    """The message of an answer, or what a chunk adds to it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChatChoice(AnyChoice, kw_only=True):
    message: ChatText | UnsetType = UNSET  # in answers
    delta: ChatText | UnsetType = UNSET  # in chunks
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
    parent: str | UnsetType | None = UNSET  # the base model of an adapter
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard] = []
