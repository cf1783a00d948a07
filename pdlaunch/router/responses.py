"""Answers /v1/responses without storing responses: turns the request into a chat, and the chunks of
the chat into events.

So engines of both kinds serve it, in pairs, and streams survive the death of an engine. vLLM's own
endpoint returns no token ids, which another engine needs to continue. Reasoning is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.errors import json_response
from pdlaunch.http.sse import DONE_DATA, ClientStream, EventDecoder
from pdlaunch.protocol.openai.body import read_json_object

# Fields that need stored or several responses, with the values that have no effect
_KEPT: dict[str, tuple[object, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "n": (None, 1),
}
# Fields that have other names in chats (empty: no field). Other fields have the same name.
_RENAMED = {"max_output_tokens": "max_completion_tokens", "input": "", "instructions": ""}
_OWN = {
    *(*_KEPT, *_RENAMED, "text", "reasoning", "tools", "tool_choice", "include", "truncation"),
    "stream_options",
}
_ECHOED = (
    *("instructions", "max_output_tokens", "temperature", "top_p", "text", "metadata"),
    # These are null until the end of the answer sets some of them.
    *("previous_response_id", "error", "incomplete_details", "usage"),
)
_TEXT_PARTS = ("input_text", "output_text", "text")


def read_response_request(raw: bytes, request_id: str) -> tuple[bytes, ResponseWriter]:
    """Return the body of the chat, and the writer of its response. Raises RequestError."""
    body = read_json_object(raw)
    for name, neutral in _KEPT.items():
        if body.get(name) not in neutral:
            message = (
                f"{name} is not supported: a request has one response, which is not stored; send "
                "the whole conversation as input"
            )
            raise RequestError(message, param=name, code="unsupported_parameter")
    chat = {name: value for name, value in body.items() if name not in _OWN and value is not None}
    chat["messages"] = _messages(body)
    for name, other in _RENAMED.items():
        if other and body.get(name) is not None:
            chat[other] = body[name]
    text, reasoning = (body.get(name) or {} for name in ("text", "reasoning"))
    if not isinstance(text, dict) or not isinstance(reasoning, dict):
        raise RequestError("text and reasoning must be objects", param="text")
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    if isinstance(form := text.get("format"), dict):
        chat["response_format"] = {"type": form.get("type")}
        if form.get("type") == "json_schema":
            schema = {name: value for name, value in form.items() if name != "type"}
            chat["response_format"]["json_schema"] = schema
    if tools := body.get("tools"):
        if not isinstance(tools, list):
            raise RequestError("tools must be a list", param="tools")
        for tool in tools:
            if not isinstance(tool, dict) or tool.get("type") != "function":
                raise RequestError("only tools of type function are supported", param="tools")
            function = {name: value for name, value in tool.items() if name != "type"}
            chat.setdefault("tools", []).append({"type": "function", "function": function})
        choice = body.get("tool_choice") or "auto"
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        chat["tool_choice"] = choice
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(chat), ResponseWriter(body, request_id)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    items = body.get("input")
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise RequestError("input must be a text, or a list of items", param="input")
    for index, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        match kind:
            case "message":
                messages.append({"role": item.get("role"), "content": _content(item, index)})
            case "function_call":
                function = {name: item.get(name) for name in ("name", "arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                told = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
                messages.append({"role": "tool"} | told)
            case "reasoning":
                pass  # clients send reasoning back with earlier answers
            case _:
                message = (
                    f"items of type {kind!r} are not supported; use message, function_call or "
                    "function_call_output"
                )
                raise RequestError(message, param=f"input[{index}].type")
    return messages


def _content(item: dict[str, Any], index: int) -> object:
    content = item.get("content")
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            message = "only parts of type input_text and output_text are supported"
            raise RequestError(message, param=f"input[{index}].content")
        parts.append({"type": "text", "text": part.get("text")})
    return parts


class ResponseWriter:
    """Turns the chunks of a chat into the events of a response, and into ``response``."""

    def __init__(self, body: dict[str, Any], request_id: str) -> None:
        self.response: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "store": False,
        } | {name: body.get(name) for name in _ECHOED}
        self._item: dict[str, Any] = {}  # the last item of the output, while it grows
        self._num_events = 0
        self._reason: str | None = None

    def event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._num_events} | fields
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(told))

    def take(self, chunk: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the events of one chunk. A whole answer is a chunk with a ``message``."""
        if error := chunk.get("error"):
            told = {name: error[name] for name in ("code", "message", "param")}
            yield self.event("error", **told)
            return
        if self._num_events == 0:
            self.response["model"] = chunk["model"]
            for kind in ("created", "in_progress"):
                yield self.event(f"response.{kind}", response=self.response)
        if usage := chunk.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self.response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        for choice in chunk["choices"]:
            delta = choice.get("delta") or choice.get("message") or {}
            if text := delta.get("content"):
                yield from self._text(text)
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            self._reason = choice.get("finish_reason") or self._reason

    def end(self) -> Iterator[bytes]:
        yield from self._end_item()
        is_cut = self._reason == "length"
        status = self.response["status"] = "incomplete" if is_cut else "completed"
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self.event(f"response.{status}", response=self.response)

    def _text(self, text: str) -> Iterator[bytes]:
        if self._item.get("type") != "message":
            yield from self._begin_item(type="message", role="assistant", content=[])
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._of_item("response.content_part.added", content_index=0, part=part)
            self._item["content"].append(part)
        self._item["content"][0]["text"] += text
        kind = "response.output_text.delta"
        yield self._of_item(kind, content_index=0, delta=text, logprobs=[])

    def _call(self, call: Mapping[str, Any]) -> Iterator[bytes]:
        function = call["function"]
        if call.get("id") is not None:
            known = {"call_id": call["id"], "name": function["name"], "arguments": ""}
            yield from self._begin_item(type="function_call", **known)
        if arguments := function.get("arguments"):
            self._item["arguments"] += arguments
            yield self._of_item("response.function_call_arguments.delta", delta=arguments)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = len(self.response["output"]) - 1
        return self.event(kind, item_id=self._item["id"], output_index=place, **fields)

    def _begin_item(self, **fields: Any) -> Iterator[bytes]:
        yield from self._end_item()
        output = self.response["output"]
        place, prefix = len(output), "msg" if fields["type"] == "message" else "fc"
        item_id = f"{prefix}_{self.response['id']}_{place}"
        self._item = {"id": item_id, "status": "in_progress"} | fields
        output.append(self._item)
        yield self.event("response.output_item.added", output_index=place, item=self._item)

    def _end_item(self) -> Iterator[bytes]:
        if not (item := self._item):
            return
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "message":
            (part,) = item["content"]
            kind = "response.output_text.done"
            yield self._of_item(kind, content_index=0, text=part["text"], logprobs=[])
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        else:
            kind, told = "response.function_call_arguments.done", item["arguments"]
            yield self._of_item(kind, arguments=told, name=item["name"])
        place = len(self.response["output"]) - 1
        yield self.event("response.output_item.done", output_index=place, item=item)
        self._item = {}


class ResponseStream(ClientStream):
    def __init__(
        self, http: web.BaseRequest, headers: Mapping[str, str], writer: ResponseWriter
    ) -> None:
        super().__init__(http, headers)
        self._writer = writer
        self._decoder = EventDecoder()

    async def write(self, event: bytes) -> None:
        await super().write(self._events(event))

    async def end(self, last: bytes = b"") -> None:
        await super().end(self._events(last))

    def _events(self, events: bytes) -> bytes:
        told = b""
        for data in self._decoder.feed(events):
            if data == DONE_DATA:
                return told + b"".join(self._writer.end())
            told += b"".join(self._writer.take(msgspec.json.decode(data)))
        return told


def whole_response(answer: web.Response, writer: ResponseWriter) -> web.Response:
    """Return the response for a whole answer of a chat."""
    assert isinstance(answer.body, bytes)
    for _ in (*writer.take(msgspec.json.decode(answer.body)), *writer.end()):
        pass
    headers = {name: value for name, value in answer.headers.items() if name.startswith("X-")}
    return json_response(writer.response, headers=headers)
