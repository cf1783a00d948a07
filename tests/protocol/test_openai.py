"""What the request models accept, how they refuse, and how much a body may hold."""

import contextlib
import gc
import json
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import (
    MAX_IGNORED_NAMES,
    OF_VLLM,
    num_token_ids,
    num_values,
    parse_request,
    read_json_object,
)
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest

TEXT = {"type": "text", "text": "hi"}
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def completion(public: bool = False, **fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, {"prompt": "x"} | fields, public=public)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {"messages": USER} | fields, public=False)


def refusal(make, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        *((wrong, None) for wrong in ([], [[]], [1, "a"], [-1], [True], 5, {}, [[1], [[2]]])),
        ([2**31], None),
    ],
)
def test_forms_of_prompts(prompt: object, prompts: list[object] | None) -> None:
    if prompts is None:
        assert refusal(completion, prompt=prompt).param == "prompt"
    else:
        assert completion(prompt=prompt).prompt == prompts


def test_unknown_fields_are_ignored_and_named_with_their_place() -> None:
    part = TEXT | {"x": 1, "cache_control": {"type": "ephemeral"}}
    request = chat(
        messages=[{"role": "user", "content": [part, part], "y": 1}],
        tools=[{"type": "function", "function": {"name": "f", "z": 1}}],
        no_stop_trim=False,
        of_no_value=None,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": True, "w": 1},
    )
    assert sorted(request.ignored_fields) == [
        "messages.content.x",
        "messages.y",
        "no_stop_trim",
        "stream_options.w",
        "tools.function.z",
    ]
    assert request.stream_options.include_usage
    many = {f"{number}{'x' * 100}": 1 for number in range(1000)}
    assert len(completion(**many).ignored_fields) == MAX_IGNORED_NAMES


def test_every_parameter_of_openais_client_is_known_and_hints_are_accepted() -> None:
    hints = {
        "metadata": {"a": "b"},
        "store": True,
        "user": "me",
        "reasoning_effort": "low",
        "prediction": {"type": "content", "content": "x"},
        "service_tier": "flex",
        "parallel_tool_calls": False,
        "vllm_xargs": {"a": 1},
    }
    assert chat(**hints).ignored_fields == ()
    assert chat(temperature=3).temperature == 3, "no upper limit, as with vLLM"
    for kind, params in (
        (ChatCompletionRequest, openai_chat.CompletionCreateParamsBase),
        (CompletionRequest, openai_completions.CompletionCreateParamsBase),
    ):
        known = {*kind.model_fields, *kind.NEUTRAL, *kind.HINTS}
        assert set(params.__annotations__) <= known


def test_what_native_engines_serve_is_not_said_to_be_of_vllm_alone() -> None:
    kinds = (ChatCompletionRequest, CompletionRequest)
    assert not OF_VLLM & {name for kind in kinds for name in kind.model_fields}
    assert set().union(*(kind.NEUTRAL for kind in kinds)) >= OF_VLLM


@pytest.mark.parametrize(
    ("make", "field", "neutral", "other"),
    [
        (chat, "echo", False, True),
        (chat, "echo", False, 0),
        (completion, "best_of", 1, 2),
        (completion, "suffix", "", "end"),
        (completion, "bad_words", [], ["x"]),
        (completion, "length_penalty", 1.0, 0.5),
        (completion, "structural_tag", None, {"a": 1}),
        (chat, "tool_choice", "auto", "required"),
        (chat, "tool_choice", "none", {"type": "function", "function": {"name": "missing"}}),
        (chat, "tool_choice", "none", {"type": "allowed_tools"}),
        (chat, "functions", [], [{}]),
    ],
)
def test_fields_that_are_not_served_are_refused_unless_neutral(make, field, neutral, other) -> None:
    make(**{field: neutral})
    error = refusal(make, **{field: other})
    assert (error.param, error.status) == (field, 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("repetition_penalty", float("inf")),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("logprobs", 21),
        ("repetition_penalty", -1e-38),
        ("seed", 2**63),
        ("stream", 1),
        ("cache_salt", 5),
        ("stop_token_ids", [-1]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(field: str, value: object) -> None:
    error = refusal(completion, **{field: value})
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith(field)
    assert str(error).startswith(field)
    if isinstance(value, int | float):
        assert f"got {value}" in str(error)


def test_fields_that_do_not_fit_each_other() -> None:
    assert refusal(completion, min_tokens=5, max_tokens=4).param == "min_tokens"
    assert refusal(completion, stream_options={"include_usage": True}).param == "stream_options"
    request = completion(
        min_tokens=5,
        max_tokens=1,
        stream_options={"include_usage": True},
        kv_transfer_params={"do_remote_decode": True},
    )
    assert request.is_remote_prefill
    assert request.kv_transfer().do_remote_decode
    assert refusal(chat, top_logprobs=2).param == "top_logprobs"
    assert chat(logprobs=True, top_logprobs=2).num_top_logprobs == 2
    assert chat(logprobs=True).num_top_logprobs == 0
    assert chat(top_logprobs=0).num_top_logprobs is None


@pytest.mark.parametrize("field", ["kv_transfer_params", "resume"])
def test_internal_fields_are_refused_in_public(field: str) -> None:
    sent = {field: {"do_remote_decode": True}}
    assert refusal(completion, public=True, **sent).param == field
    nested = refusal(completion, public=True, vllm_xargs=sent)
    assert nested.param == f"vllm_xargs.{field}"
    assert completion(public=True, **{field: None}).model_dump()[field] is None


def test_resume_has_the_tokens_of_every_choice() -> None:
    resume = completion(n=2, resume={"choices": [[{"token_id": 1}], []]}).resumed()
    assert resume is not None
    assert resume.sent
    assert [len(choice) for choice in resume.choices] == [1, 0]
    assert refusal(lambda: completion(resume={"choices": []}).resumed()).param == "resume.choices"
    assert refusal(lambda: completion(resume={"choices": [[{}]]}).resumed()).param == "resume"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "audio": {"id": "x"}}], "messages[0].audio"),
    ],
)
def test_what_a_message_may_not_be(messages: list[object], param: str) -> None:
    assert refusal(chat, messages=messages).param == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "image"])
def test_images_and_the_like_get_an_error_that_says_so(kind: str) -> None:
    for part in ({"type": kind, kind: {"url": "data:"}}, {kind: {"url": "data:"}}):
        error = refusal(chat, messages=[*USER, {"role": "user", "content": [TEXT, part]}])
        assert error.param == "messages[1].content[1].type"
        assert f"type '{kind}' is not supported: the model reads text alone" in str(error)


def test_every_form_of_text_is_a_text() -> None:
    parts = ["a", TEXT, {"text": "b"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None},
    ]
    texts = [message.text() for message in chat(messages=messages).messages]
    assert texts == ["a\nhi\nb", "x"]


def test_a_history_with_tool_calls_is_shown_to_the_template() -> None:
    call = {"id": "1", "type": "function"}
    sent = call | {"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [sent], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    request = chat(messages=messages, tools=[TOOL])
    called, result = (message.for_template() for message in request.messages)
    assert called == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call | {"function": {"name": "weather", "arguments": {"city": "Bern"}}}],
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    assert [tool.for_template() for tool in request.tools] == [TOOL]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
@given(data=st.data())
def test_any_body_is_a_request_or_a_request_error(kind, data: st.DataObject) -> None:
    names = st.sampled_from([*kind.model_fields, *kind.NEUTRAL]) | st.text(max_size=5)
    required = st.fixed_dictionaries(
        {}, optional={"prompt": st.just("x"), "messages": st.just(USER)}
    )
    body = data.draw(required) | data.draw(st.dictionaries(names, values, max_size=5))
    with contextlib.suppress(RequestError):
        assert parse_request(kind, body, public=False).n >= 1


BIASES = {str(index): 1 for index in range(1025)}
CALL = {"function": {"name": "f", "arguments": "[]" * 60_000}}


def parts(number: int) -> dict[str, Any]:
    return {"role": "user", "content": [TEXT] * number}


@pytest.mark.parametrize(
    ("field", "value", "param", "numbers"),
    [
        ("logit_bias", BIASES, "logit_bias", ("1025", "1024")),
        ("user", "x" * 1025, "user", ("1024",)),
        ("stop", ["x"] * 33, "stop", ("33", "32")),
        ("stop", ["x" * 1001], "stop[0]", ("1000",)),
        ("prompt", ["x"] * 1025, "prompt", ("1024",)),
        ("messages", USER * 4097, "messages", ("4097", "4096")),
        ("messages", [parts(4097)], "messages[0].content", ("4097", "4096")),
        ("messages", [parts(2050), parts(2050)], "messages", ("4100", "4096")),
        ("messages", [{"role": "assistant", "tool_calls": [CALL] * 2}], "messages", ("100000",)),
    ],
)
def test_what_is_too_many_is_refused_with_both_numbers(field, value, param, numbers) -> None:
    error = refusal(chat if field == "messages" else completion, **{field: value})
    assert error.param == param
    assert all(number in str(error) for number in numbers)


class _Noted(str):
    """Text that tells when it is gone, which a plain string cannot."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    "refused",
    [{"suffix": "x"}, {"max_tokens": -1}, {"messages": [], "stop": [1]}, {"n": 2, "best_of": 3}],
    ids=str,
)
def test_a_refused_body_is_not_kept(refused: dict[str, object]) -> None:
    """pydantic's error holds the one that a validator raised, where no garbage collector looks."""
    body = {"prompt": _Noted("x"), **refused}
    prompt = weakref.ref(body["prompt"])
    with pytest.raises(RequestError):
        parse_request(CompletionRequest, body, public=False)
    del body
    gc.collect()
    assert prompt() is None


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"5", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a":"\\ud800"}']
)
def test_bodies_that_are_no_json_object(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_json_object(raw)
    assert caught.value.status == 400


@given(
    st.recursive(
        st.text() | st.integers() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_values_are_counted_as_they_are(value: object) -> None:
    """Whatever strings hold: quotes, backslashes and brackets in them are no values."""

    def count(value: object) -> int:
        match value:
            case dict():
                return 1 + len(value) + sum(map(count, value.values()))
            case list():
                return 1 + sum(map(count, value))
            case _:
                return int(isinstance(value, str))

    for raw in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert num_values(raw.encode()) == count(value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_hostile_strings_are_counted_in_one_pass(end: bytes) -> None:
    assert num_values(b'"' + b'\\"' * 4_000_000 + end) == 1


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RequestError, match="strings, lists and objects") as raised:
        read_json_object(b'{"x": [' + b",".join([b"[]"] * 100_000) + b"]}")
    assert raised.value.code == "too_many_values"
    # The tokens of an answer that goes on are not counted, but those that a client makes up are.
    resume = {"choices": [[{"token_id": 5}] * 100_000], "sent": True}
    raw = json.dumps({"prompt": "x", "resume": resume}).encode()
    assert read_json_object(raw, public=False)["resume"] == resume
    with pytest.raises(RequestError, match="strings, lists and objects"):
        read_json_object(raw)


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ('{"prompt": [1, 2,3]}', 3),
        ('{"prompt": "1,2"}', 0),
        ('{"prompt": [[1],[2]]}', 0),
        ('{"a": [1,2]}', 0),
        ("{", 0),
        ("[1]", 0),
    ],
)
def test_token_ids_are_counted_without_parsing_them(body: str, number: int) -> None:
    assert num_token_ids(body.encode(), "prompt") == number
