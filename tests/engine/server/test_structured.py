"""Structured output, tool calls, and prompts that are echoed and scored, at one engine."""

import dataclasses
import json
from typing import Any

import llguidance
import pytest

from pdlaunch.engine.server.structured import ToolCallReader, grammar_of, whole_calls
from pdlaunch.engine.server.text import ChatTemplate
from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import parse_request
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
OPEN = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
OSLO = '{"city": "Oslo", "days": 2}'
WEATHER = f'<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}
BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def chat_grammar(**fields: Any) -> str:
    body = {"messages": HELLO, "tools": TOOLS} | fields
    return grammar_of(parse_request(ChatCompletionRequest, body, public=True))


def grammar(**fields: Any) -> str:
    return grammar_of(parse_request(CompletionRequest, {"prompt": "x"} | fields, public=True))


# Grammars


@pytest.mark.parametrize(
    ("fields", "fits", "fails"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}},
            OSLO,
            '{"city": "Paris"}',
        ),
        ({"guided_json": json.dumps(CITY)}, OSLO, '{"city":\n\n\n"Oslo"}'),
        ({"structured_outputs": {"json": CITY, "regex": None}}, OSLO, "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "x"),
        ({"guided_json": {"anyOf": [OPEN, {"type": "null"}]}}, '{"a": {}}', '{"a": {"b": 1}}'),
        ({"guided_json": OPEN | {"additionalProperties": True}}, '{"a": {}, "b": 1}', "[]"),
        ({"guided_json": OPEN | {"allOf": [{"required": ["b"]}]}}, '{"a": {}, "b": 1}', "[]"),
        ({"guided_regex": "[ab]{2}/c"}, "ba/c", "bc"),
        ({"guided_choice": ['one "a"', "two"]}, 'one "a"', "one"),
        ({"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}}, "aab", "a"),
        ({"guided_grammar": 'start: "a" start | "b"'}, "ab", "a"),
    ],
)
def test_an_answer_has_to_fit(fields, fits, fails) -> None:
    found = grammar(**fields)
    assert accepts(found, fits)
    assert not accepts(found, fails)


def test_other_answers_have_no_grammar() -> None:
    assert grammar(response_format={"type": "text"}, structured_outputs={}, guided_json=None) == ""
    assert chat_grammar() == chat_grammar(tool_choice="none") == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": {"type": "string", "format": "nonsense"}}, "guided_json"),
        ({"guided_json": {"if": {"type": "null"}, "then": False}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ],
)
def test_what_is_no_grammar_is_refused(fields, param) -> None:
    with pytest.raises(RequestError) as refusal:
        grammar(**fields)
    assert (refusal.value.param, refusal.value.status) == (param, 400)


@pytest.mark.parametrize(
    ("fields", "fits", "fails"),
    [
        ({"tool_choice": "required"}, f"{WEATHER}\n{TIME}", "hello"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, TIME, f"{TIME}\n{TIME}"),
        ({"tool_choice": NAMED}, WEATHER, TIME),
        ({"tool_choice": NAMED, "response_format": {"type": "json_object"}}, WEATHER, "{}"),
        ({"tool_choice": "required"}, TIME, TIME.replace("{}", '{"a": 1}')),
        # Of two things that an agent may do, it has to do one.
        ({"response_format": {"type": "json_object"}}, WEATHER, "hello"),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', f"{WEATHER}{{}}"),
    ],
)
def test_calls_that_must_be_made_fit_their_parameters(fields, fits, fails) -> None:
    found = chat_grammar(**fields)
    assert accepts(found, fits)
    assert not accepts(found, fails)


# Calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call < here", "no call < here", []),
        (f"I look.\n{WEATHER}\n{TIME}\n", "I look.\n", [("weather", OSLO), ("time", "{}")]),
        (f"{TIME}then", "then", [("time", "{}")]),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
        ("<tool_call>{", "<tool_call>{", []),
        # The end tag is missing, as for models that end with it as a stop token.
        (WEATHER.removesuffix("\n</tool_call>"), "", [("weather", OSLO)]),
    ],
)
def test_calls_are_read_in_pieces_of_any_size(text, content, calls) -> None:
    for size in (1, 2, 3, 7, len(text)):
        reader, pieces, read = ToolCallReader(), [], ""
        for start in range(0, len(text), size):
            new, found = reader.push(text[start : start + size])
            read, pieces = read + new, pieces + found
        new, found = reader.finish(is_cut=False)
        whole = whole_calls(pieces + found)
        assert read + new == content
        assert [(call.function.name, call.function.arguments) for call in whole] == calls


async def test_calls_are_answered_and_streamed_alike(make_engine, rank: FakeRank) -> None:
    engine = await make_engine(max_model_len=1000)
    rank.script = rank.says(rank.ids(f"Well. {WEATHER}") + rank.ids(END_TOKEN), ends=True)
    (choice,) = (await engine.chat(tools=TOOLS))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Well. ")
    assert call["function"] == {"name": "weather", "arguments": OSLO}
    chunks = await engine.stream(CHAT, messages=HELLO, tools=TOOLS)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well. "
    assert [piece["index"] for piece in pieces] == [0] * len(pieces)
    assert pieces[0]["function"]["name"] == "weather"
    assert "".join(piece["function"]["arguments"] for piece in pieces) == OSLO
    assert len(pieces) > 3
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_call_goes_on_behind_any_of_its_tokens(make_engine, rank: FakeRank) -> None:
    engine = await make_engine(max_model_len=1000)
    ids = rank.ids(f"Well. {TIME}") + rank.ids(END_TOKEN)
    rank.script = rank.says(ids, ends=True)
    fields = {"messages": HELLO, "tools": TOOLS, "return_token_ids": True}
    _, *chunks, _ = await engine.stream(CHAT, **fields)
    for at in range(1, len(ids)):
        known = {"choices": [[{"token_id": token_id} for token_id in ids[:at]]]}
        *rest, _ = await engine.stream(CHAT, **fields, resume=known)
        assert told(chunks[:at]) + told(rest) == told(chunks), at


def told(chunks: list[dict]) -> str:
    """What chunks say of contents, names and arguments, in a row; the ids of calls are random."""
    said = ""
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        said += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            said += f"[{piece['function'].get('name', '')}]{piece['function']['arguments']}"
    return said.replace("[]", "")


async def test_calls_are_text_where_no_tool_may_be_called(make_engine, rank: FakeRank) -> None:
    engine = await make_engine(max_model_len=1000)
    rank.script = rank.says(rank.ids(TIME) + rank.ids(END_TOKEN), ends=True)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = (await engine.chat(**fields, max_tokens=70))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (TIME, "stop")


async def test_the_rank_gets_the_grammar(engine: Engine, rank: FakeRank) -> None:
    fields = {"ignore_eos": True, "min_tokens": 3, "max_tokens": 4, "guided_regex": "a+"}
    await engine.complete(**fields)
    (request,) = rank.added()
    assert accepts(request.sampling.grammar, "aaa")
    # Only end tokens can follow the end of a grammar: they end the answer, and may come at once.
    assert set(request.sampling.eos_token_ids) <= set(request.sampling.stop_token_ids)
    assert request.sampling.min_tokens == 0


async def test_a_template_that_shows_no_tools_is_told_of_them(engine: Engine) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be short."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "tools": TOOLS}
    request = parse_request(ChatCompletionRequest, body, public=True)
    model = engine.service.model
    text = model.render_chat(request)
    assert text.startswith("<|im_start|>system\nBe short.\n\nYou may call these functions")
    assert '{"name": "weather", "parameters": {"type": "object"' in text
    assert f"<|im_start|>assistant\n{TIME}<|im_end|>" in text
    shows = ChatTemplate("{{ tools | length }} {{ messages[0].content }}", {})
    assert dataclasses.replace(model, chat_template=shows).render_chat(request) == "2 Be short."


# Prompts


async def test_a_prompt_is_echoed_and_scored(engine: Engine, rank: FakeRank) -> None:
    answer = await engine.complete(prompt="hello world", echo=True, logprobs=1, max_tokens=2)
    (choice,) = answer["choices"]
    ids = rank.ids("hello world")
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("hello world")
    assert len(choice["text"]) > len("hello world")
    assert logprobs["token_logprobs"] == [None, *[-0.25] * (len(ids) - 1), -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert min(logprobs["top_logprobs"][1].values()) == -0.25
    offsets = logprobs["text_offset"]
    assert [
        choice["text"][offset:].startswith(token)
        for offset, token in zip(offsets, logprobs["tokens"], strict=True)
    ] == [True] * len(offsets)
    assert answer["usage"]["completion_tokens"] == 2


async def test_no_token_is_told_of_a_limit_of_none(engine: Engine, rank: FakeRank) -> None:
    fields = {"prompt": [5, 6, 7], "echo": True, "max_tokens": 0, "logprobs": 0}
    (choice,) = (await engine.complete(**fields))["choices"]
    assert rank.added()[0].sampling.max_tokens == 1
    assert choice["finish_reason"] == "length"
    assert choice["text"] == engine.service.model.tokenizer.decode(
        [5, 6, 7], skip_special_tokens=True
    )
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
    chunks = await engine.stream(**fields)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == [choice["text"]]


async def test_log_probabilities_of_a_prompt_stand_by_token_id(engine: Engine, rank: FakeRank):
    for answer in (
        (await engine.complete(prompt=[5, 6], prompt_logprobs=1, max_tokens=1))["choices"][0],
        await engine.chat(prompt_logprobs=1, max_tokens=1),
    ):
        first, *others = answer["prompt_logprobs"]
        assert first is None
        for told in others:
            (best, own) = told
            assert (best, told[best]["rank"], told[best]["logprob"]) == ("100", 1, -0.1)
            assert (told[own]["rank"], told[own]["logprob"]) == (None, -0.25)
