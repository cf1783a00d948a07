"""Defines the messages of a chat and its tools, and what a chat template sees of them."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import MAX_JSON_VALUES, RequestBody, num_values

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # bounds the parts of all messages together
MAX_TOOLS = 1024

_TEXT_MEMBERS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The member that holds the text of a part, by its type."""


class TextPart(RequestBody):
    """Holds one part of a message's content; only text is served."""

    PLACE = "messages.content."
    HINTS = frozenset({"annotations", "cache_control"})

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, part: object) -> object:
        """Return the part as one of type text. Raises RequestError for images and the like."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, dict):
            return part
        # Some clients leave the type out where the member says it.
        kind = part.get("type") or ("text" if "text" in part else next(iter(part), "text"))
        if not isinstance(kind, str):
            return part
        member = _TEXT_MEMBERS.get(kind)
        if member is None:
            raise RequestError(
                f"content of type {kind[:100]!r} is not supported: the model reads text alone, no "
                "images, audio, video or files; send parts of type 'text'",
                param="type",
                code="unsupported_content",
            )
        others = {name: value for name, value in part.items() if name != member}
        return others | {"type": "text", "text": part.get(member)}


class FunctionCall(RequestBody):
    PLACE = "messages.tool_calls.function."

    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] = ""


class ToolCall(RequestBody):
    PLACE = "messages.tool_calls."
    HINTS = frozenset({"index"})

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return what a chat template sees: arguments as an object where they are one in JSON."""
        arguments: object = self.function.arguments or {}
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ToolFunction(RequestBody):
    PLACE = "tools.function."

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestBody):
    PLACE = "tools."

    type: Literal["function"] = "function"
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(RequestBody):
    """Holds one message; members of an answer that a client sends back are taken too."""

    PLACE = "messages."
    NEUTRAL = {"audio": (), "function_call": ()}
    HINTS = frozenset({"annotations", "refusal"})

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(max_length=MAX_PARTS)] = []
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # the name of ``reasoning`` in other APIs

    def text(self) -> str:
        """Return the content; parts are joined by line ends, as vLLM does."""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """Return what a chat template sees, as in vLLM."""
        reasoning = self.reasoning or self.reasoning_content
        members = {
            "tool_calls": [call.for_template() for call in self.tool_calls] or None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        given = {name: value for name, value in members.items() if value is not None}
        return {"role": self.role, "content": self.text()} | given


def _check_size(messages: list[ChatMessage]) -> list[ChatMessage]:
    num_parts = sum(len(message.content) for message in messages)
    if num_parts - len(messages) > MAX_PARTS:  # each message has one part at least
        raise ValueError(f"{num_parts} parts of content; at most {MAX_PARTS} are accepted")
    arguments = [call.function.arguments for message in messages for call in message.tool_calls]
    # JSON in a string, which the check of the whole body does not see.
    texts = [text.encode() for text in arguments if isinstance(text, str)]
    if sum(map(num_values, texts)) > MAX_JSON_VALUES:
        raise ValueError(
            f"the arguments of tool calls have more than {MAX_JSON_VALUES} strings, lists and "
            "objects"
        )
    return messages


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_size)
]
