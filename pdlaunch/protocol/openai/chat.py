"""Defines the request of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import RequestBody
from pdlaunch.protocol.openai.generation import MAX_LOGPROBS, GenerationRequest

MAX_MESSAGES = 4096
MAX_PARTS = 4096
"""Bounds the parts of all messages together."""


class TextPart(RequestBody):
    """Holds one part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(RequestBody):
    """Holds one message; ``null`` members of an answer that a client sends back are tolerated."""

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(max_length=MAX_PARTS)] = []
    name: str | None = None
    tool_calls: list[Any] = Field([], max_length=0)
    annotations: list[Any] = Field([], max_length=0)
    refusal: None = None
    audio: None = None
    function_call: None = None

    def text(self) -> str:
        """Return the content; parts are joined by line ends, as vLLM does."""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """Return what a chat template sees."""
        message = {"role": self.role, "content": self.text()}
        return message if self.name is None else message | {"name": self.name}


def _check_parts(messages: list[ChatMessage]) -> list[ChatMessage]:
    num_parts = sum(len(message.content) for message in messages)
    # A message of text alone has one part.
    if num_parts - len(messages) > MAX_PARTS:
        raise ValueError(f"{num_parts} parts of content; at most {MAX_PARTS} are accepted")
    return messages


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_parts)
]


class ChatCompletionRequest(GenerationRequest):
    """Asks for a chat completion."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = GenerationRequest.NEUTRAL | {
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "include_reasoning": (True, False),
        "mm_processor_kwargs": (),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
