"""Defines the request of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.generation import MAX_LOGPROBS, GenerationRequest
from pdlaunch.protocol.openai.messages import Messages, Tools


class ChatCompletionRequest(GenerationRequest):
    """Asks for a chat completion."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = GenerationRequest.NEUTRAL | {
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "web_search_options": (),
    }
    HINTS: ClassVar[frozenset[str]] = GenerationRequest.HINTS | {
        "include_reasoning",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "parallel_tool_calls",
        "prediction",
        "verbosity",
    }

    messages: Messages
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = Field(None, max_length=64)
    tools: Tools = []
    tool_choice: Any = "none"

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )
        allowed = ("none",) if self.tools else ("none", "auto")
        if self.tool_choice not in allowed:
            raise RequestError(
                "tool_choice: the model's calls are not parsed; leave tool_choice out or send "
                '"none", and a call is in the text of the answer as the model writes it',
                param="tool_choice",
                code="unsupported_parameter",
            )
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return what the chat template is told besides messages and tools, as vLLM tells it."""
        effort = self.reasoning_effort
        told = (
            {}
            if effort is None
            else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        )
        return told | self.chat_template_kwargs

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
