"""Defines POST /tokenize and /detokenize, in the forms of vLLM."""

from __future__ import annotations

from typing import Any

import msgspec

from pdlaunch.protocol.openai.body import RequestBody
from pdlaunch.protocol.openai.generation import TokenId
from pdlaunch.protocol.openai.messages import Messages, Tools


class TokenizeCompletionRequest(RequestBody):
    """Asks for the token ids of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(RequestBody):
    """Asks for the token ids of messages, rendered by the chat template."""

    model: str | None = None
    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: Tools = []

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return what the chat template is told besides messages and tools."""
        return self.chat_template_kwargs


class DetokenizeRequest(RequestBody):
    """Asks for the text of token ids; special tokens are kept."""

    model: str | None = None
    tokens: list[TokenId]


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """Answers /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """Answers /detokenize."""

    prompt: str
