"""POST /tokenize and /detokenize, in the forms of vLLM."""

from __future__ import annotations

from typing import Any

import msgspec

from pdlaunch.protocol.openai.body import RequestBody
from pdlaunch.protocol.openai.chat import Messages
from pdlaunch.protocol.openai.generation import TokenId


class TokenizeCompletionRequest(RequestBody):
    """Text to token ids."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(RequestBody):
    """Messages, rendered by the chat template, to token ids."""

    model: str | None = None
    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(RequestBody):
    """Token ids to text; special tokens are kept."""

    model: str | None = None
    tokens: list[TokenId]


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """Answer of /detokenize."""

    prompt: str
