"""/v1/responses over engines that know chats alone, held to the types of OpenAI's library."""

import json
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pdlaunch.router.responses import ResponseWriter, read_response_request
from tests.router.conftest import Answer, Stand, pairs
from tests.router.fake_engine import expected_tokens, text_of

PATH = "/v1/responses"
ASKED = {"input": "Hello", "instructions": "Be short.", "seed": 5}
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
TEXT = text_of(expected_tokens(MESSAGES, 5, 0, 6))
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def told(raw: bytes) -> list[Any]:
    """The events of a stream, each of which has the name and the form that clients expect."""
    found = []
    for event in raw.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(EVENTS.validate_python(json.loads(data.removeprefix("data: "))))
        assert name == f"event: {found[-1].type}"
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


async def test_a_response_is_answered_and_streamed_alike(stand: Stand) -> None:
    await stand.start_pair()
    body = ASKED | {"max_output_tokens": 6}
    answer = await stand.post(body, path=PATH)
    whole = Response.model_validate(answer.json())
    assert (whole.output_text, whole.status) == (TEXT, "incomplete")
    assert whole.incomplete_details is not None
    assert whole.usage.output_tokens == 6
    events = told((await stand.post(body | {"stream": True}, path=PATH)).raw)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == TEXT
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert len(deltas) == 6
    assert events[-1].response.usage.output_tokens == 6


async def test_another_engine_goes_on_and_an_error_is_an_event(stand: Stand) -> None:
    engines = pairs(2)
    await stand.start(engines, recovery_wait_s=0.1)
    for engine in engines:
        engine.die_after = 3
    answer = await stand.post(ASKED | {"max_output_tokens": 6, "stream": True}, path=PATH)
    assert told(answer.raw)[-1].response.output_text == TEXT
    for engine in engines[:-1]:
        engine.status = 500
    answer = await stand.post(ASKED | {"max_output_tokens": 60, "stream": True}, path=PATH)
    assert told(answer.raw)[-1].type == "error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": "json"}, "text"),
        ({"max_output_tokens": 0}, "max_completion_tokens"),
    ],
)
async def test_what_is_not_served_is_named(stand: Stand, fields: dict, param: str) -> None:
    await stand.start_pair()
    answer: Answer = await stand.post(ASKED | fields, path=PATH)
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_embeddings_are_refused_by_name(stand: Stand) -> None:
    await stand.start_pair()
    answer = await stand.post({"input": "x"}, path="/v1/embeddings")
    assert answer.status == 404
    assert "embeddings are not served" in answer.json()["error"]["message"]


def test_a_conversation_with_calls_becomes_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
    ]
    form = {"type": "json_schema", "name": "n", "schema": {}, "strict": True}
    body = {"input": items, "text": {"format": form}, "reasoning": {"effort": "low"}}
    body |= {"tools": [{"type": "function", "name": "f", "parameters": {}}], "temperature": 0}
    body["tool_choice"] = {"type": "function", "name": "f"}
    chat = msgspec.json.decode(read_response_request(msgspec.json.encode(body), "1")[0])
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for call_id, name in (("1", "f"), ("2", "g"))
    ]
    assert chat["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    named = {"name": "n", "schema": {}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": named}
    assert chat["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (chat["reasoning_effort"], chat["temperature"]) == ("low", 0)


def test_calls_become_items_of_their_own() -> None:
    writer = ResponseWriter({}, "1")
    first = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{"}}
    rest = {"index": 0, "function": {"arguments": "}"}}
    deltas = [{"role": "assistant", "content": "Well."}, {"tool_calls": [first]}]
    deltas += [{"tool_calls": [rest]}]
    raw = b""
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        raw += b"".join(writer.take({"model": "tiny", "choices": [choice]}))
    events = told(raw + b"".join(writer.end()))
    message, call = events[-1].response.output
    assert (message.content[0].text, message.status) == ("Well.", "completed")
    assert (call.call_id, call.name, call.arguments) == ("call_1", "f", "{}")
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert pieces == ["{", "}"]
