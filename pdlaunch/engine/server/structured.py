"""Builds the grammar of an answer, and reads the tool calls in a model's text.

Calls have the Hermes format, which Qwen and others write. If the chat template shows no tools, the
system message explains the format::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Grammars have llguidance's format; the first grammar imports it. JSON has one space after each comma
and colon and no other whitespace: otherwise a model could write whitespace until its last token.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import UNSET

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from pdlaunch.protocol.openai.responses import CalledFunction, CalledTool

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')
_TOLD = """\
You may call these functions, one JSON object to a line:
{tools}
To call one, answer with its name and arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_JOINS = {"allOf", "anyOf", "oneOf", "$ref"}
# Kinds of constraints, by their names in ``structured_outputs`` and after ``guided_``
_KINDS = ("json", "regex", "choice", "grammar")


# Grammars


def grammar_of(request: CompletionRequest | ChatCompletionRequest) -> str:
    """Return the grammar of the answer; empty if any text is allowed. Raises RequestError."""
    found = list(_constraints(request))
    if len(found) > 1:
        names = " and ".join(place for place, *_ in found)
        raise RequestError(f"{names} cannot be combined: set one of them", param=found[1][0])
    calls = _calls(request) if isinstance(request, ChatCompletionRequest) else ""
    is_forced = isinstance(request, ChatCompletionRequest) and request.must_call
    if is_forced or (calls and found and found[0][1] == "json"):
        place, answer = "tools", ""
        if not is_forced:
            place, _, schema = found[0]
            answer = f" | answer\nanswer: {_json(schema, place)}"
        grammar = f"start: calls{answer}\n{calls}"
    elif found:
        place, kind, value = found[0]
        grammar = _grammar(place, kind, value)
    else:
        return ""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise RequestError(f"{place}: {messages[0]}", param=place)
    return grammar


def _constraints(
    request: CompletionRequest | ChatCompletionRequest,
) -> Iterator[tuple[str, str, Any]]:
    """Yield path, kind and value of each constraint. Raises RequestError."""
    if given := request.response_format:
        kind, place = given.get("type"), "response_format"
        if kind == "json_object":
            yield place, "json", {"type": "object"}
        elif kind == "json_schema":
            named = given.get("json_schema")
            if not isinstance(named, dict) or named.get("schema") is None:
                raise RequestError("json_schema needs a schema", param=f"{place}.json_schema")
            yield f"{place}.json_schema.schema", "json", named["schema"]
        elif kind != "text":
            raise RequestError(
                f"type {kind!r} is not supported; use text, json_object or json_schema",
                param=f"{place}.type",
            )
    for kind in _KINDS:
        if (value := getattr(request, f"guided_{kind}")) is not None:
            yield f"guided_{kind}", kind, value
    outputs = request.structured_outputs or {}
    for kind, value in outputs.items():
        place = f"structured_outputs.{kind}"
        if kind == "json_object":
            if value:
                yield place, "json", {"type": "object"}
        elif kind in _KINDS:
            if value is not None:
                yield place, kind, value
        elif value:
            raise RequestError(
                f"{kind} is not supported; use one of {', '.join(_KINDS)}, json_object",
                param=place,
                code="unsupported_parameter",
            )


def _grammar(place: str, kind: str, value: Any) -> str:
    import llguidance

    if kind == "json":
        return f"start: {_json(value, place)}"
    if kind == "choice":
        if not isinstance(value, list) or not value or {*map(type, value)} != {str}:
            raise RequestError("must be a list of strings", param=place)
        return "start: " + " | ".join(map(json.dumps, value))
    if not isinstance(value, str):
        raise RequestError("must be a string", param=place)
    try:
        grammar: str = llguidance.grammar_from("regex" if kind == "regex" else "grammar", value)
    except ValueError as error:
        raise RequestError(f"{place}: {error}", param=place) from None
    return grammar


def _calls(request: ChatCompletionRequest) -> str:
    """Return the rule ``calls`` for the tool calls that the request allows; empty for none."""
    functions = request.callable_functions
    if not functions:
        return ""
    more = f" ({json.dumps(chr(10))} call)*" if request.many_calls else ""
    names = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [f"calls: call{more}", f"call: {names}"]
    for index, function in enumerate(functions):
        head = f'{CALL_START}\n{{"name": {json.dumps(function.name)}, "arguments": '
        arguments = _json(function.parameters or NO_ARGUMENTS, f"tools.{function.name}.parameters")
        end = json.dumps(f"}}\n{CALL_END}")
        rules.append(f"call_{index}: {json.dumps(head)} {arguments} {end}")
    return "\n".join(rules)


def _json(schema: Any, place: str) -> str:
    """Return the part of a grammar for a JSON schema, which may be given as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{place} is not valid JSON: {error}", param=place) from None
    if not isinstance(schema, dict):
        if schema is not True:
            raise RequestError("must be a JSON schema: an object", param=place)
        schema = {}
    try:
        return f"%json {json.dumps(_closed(schema) | {'x-guidance': JSON_FORM})}"
    except RecursionError:
        raise RequestError(f"{place} is nested too deeply", param=place) from None


def _closed(schema: Any) -> Any:
    """Return a JSON schema that allows only the properties that it names, unless it sets
    ``additionalProperties``: vLLM's default. Weak models would add properties without end.
    """
    if isinstance(schema, list):
        return list(map(_closed, schema))
    # Several schemas that describe one object cannot be closed one by one.
    if not isinstance(schema, dict) or ("properties" in schema and not _JOINS.isdisjoint(schema)):
        return schema
    closed = dict(schema)
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(members := schema.get(name), dict):
            closed[name] = {key: _closed(value) for key, value in members.items()}
    for name in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties"):
        if name in schema:
            closed[name] = _closed(schema[name])
    return {"additionalProperties": False} | closed if "properties" in schema else closed


# Calls


class ToolCallReader:
    """Splits text into content and calls. The output so far depends only on the text so far, so an
    engine that takes over a stream continues at the same place.

    ::

        content <tool_call> {"name": "f", "arguments": ARGUMENTS } </tool_call> content ..
                │           └ held until it is whole  │          └ held: may not be arguments
                └ held: the beginning of a tag        └ returned as they arrive
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._in_arguments = False
        self._name: str | None = None  # of a call without pieces so far

    def push(self, text: str) -> tuple[str, list[CalledTool]]:
        """Add text; return the content and the pieces of calls that are certain now."""
        self._held += text
        content, calls = "", list[CalledTool]()
        while True:
            if self._in_arguments:
                arguments, tag, rest = self._held.partition(CALL_END)
                if not tag:
                    arguments = arguments[: len(arguments) - overlap(arguments, CALL_END)]
                given = _without_end(arguments)
                if given or (tag and self._name is not None):
                    calls.append(self._piece(given))
                self._held = rest if tag else self._held[len(given) :]
                if not tag:
                    return content, calls
                self._in_arguments = False
                continue
            before, tag, rest = self._held.partition(CALL_START)
            if not tag:
                before = before[: len(before) - overlap(before, CALL_START)]
            # Line ends between calls are not content.
            content += "" if self.num_calls and not before.strip() else before
            self._held = self._held[len(before) :]
            if not tag:
                return content, calls
            if (head := _HEAD.match(rest)) is None:
                if CALL_END not in rest:
                    return content, calls
                # Not a call: keep the text of the model.
                body, _, self._held = rest.partition(CALL_END)
                content += f"{CALL_START}{body}{CALL_END}"
                continue
            self._name = json.loads(head[1], strict=False)
            self.num_calls += 1
            self._in_arguments, self._held = True, rest[head.end() :]

    def finish(self, *, is_cut: bool) -> tuple[str, list[CalledTool]]:
        """Return the held-back text. ``is_cut``: the token limit has ended the text."""
        held, self._held = self._held, ""
        if not self._in_arguments:
            return held, []
        given = held if is_cut else _without_end(held)
        return "", [self._piece(given)] if given or self._name is not None else []

    def _piece(self, arguments: str) -> CalledTool:
        # The first piece has the name and some arguments, because clients parse it at once.
        index, function = self.num_calls - 1, CalledFunction(arguments=arguments)
        if self._name is None:
            return CalledTool(index=index, function=function)
        function.name, self._name = self._name, None
        call_id = f"call_{secrets.token_hex(12)}"
        return CalledTool(index=index, id=call_id, type="function", function=function)


def overlap(text: str, tag: str) -> int:
    """Return the length of the longest ending of ``text`` with which ``tag`` begins."""
    sizes = range(min(len(text), len(tag) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)


def _without_end(arguments: str) -> str:
    """Return arguments without the closing brace of the call and the space around it."""
    return arguments.rstrip().removesuffix("}").rstrip()


def whole_calls(pieces: Sequence[CalledTool]) -> list[CalledTool]:
    """Join the pieces of calls, for an answer that is not streamed."""
    calls: list[CalledTool] = []
    for piece in pieces:
        if piece.id is not UNSET:
            function = CalledFunction(name=piece.function.name, arguments=piece.function.arguments)
            calls.append(CalledTool(id=piece.id, type=piece.type, function=function))
        else:
            calls[-1].function.arguments += piece.function.arguments
    return calls


def show_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write tools and calls into the contents of messages, for templates without tools."""
    shown = []
    for message in messages:
        calls = [
            f"{CALL_START}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CALL_END}"
            for call in message.get("tool_calls") or ()
        ]
        content = "\n".join(filter(None, [message["content"], *calls]))
        shown.append(dict(message) | {"content": content})
    told = _TOLD.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    if shown[0]["role"] == "system":
        told = f"{shown[0]['content']}\n\n{told}"
        del shown[0]
    return [{"role": "system", "content": told}, *shown]
