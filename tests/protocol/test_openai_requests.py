"""What the request models accept and how they refuse."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import MAX_IGNORED_NAMES, parse_request, read_json_object
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from tests.protocol.openai_bodies import TEXT, USER, chat, completion, refusal


def test_null_means_the_default():
    request = completion(
        temperature=None,
        stop=None,
        max_tokens=None,
        stream_options=None,
        logit_bias=None,
        suffix=None,
    )
    assert (request.temperature, request.stop, request.token_limit) == (1.0, [], None)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_every_form_of_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], [True], 5, {}, [[1], [[2]]], [2**31]])
def test_other_forms_of_prompt_are_refused(prompt):
    assert refusal(completion, prompt=prompt).param == "prompt"


def test_unknown_fields_are_ignored_and_named_with_their_place():
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
    assert request.include_usage


def test_only_so_many_names_of_ignored_fields_are_kept():
    many = {f"{number}{'x' * 100}": 1 for number in range(1000)}
    assert len(completion(**many).ignored_fields) == MAX_IGNORED_NAMES


def test_strict_fields_refuse_an_unknown_field_with_the_nearest_name():
    with pytest.raises(RequestError) as caught:
        parse_request(
            CompletionRequest, {"prompt": "x", "temprature": 1}, public=True, strict_fields=True
        )
    assert (caught.value.param, caught.value.code) == ("temprature", "unknown_parameter")
    assert "did you mean 'temperature'?" in str(caught.value)
    given = {"messages": [{"role": "user", "content": "x", "nam": "y"}]}
    with pytest.raises(RequestError) as caught:
        parse_request(ChatCompletionRequest, given, public=True, strict_fields=True)
    assert caught.value.param == "messages.nam"


def test_hints_of_any_value_are_accepted():
    """Every parameter of OpenAI's client is known here, and nothing of it is refused as a hint."""
    hints = {
        "metadata": {"a": "b"},
        "store": True,
        "user": "me",
        "reasoning_effort": "low",
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "high",
        "service_tier": "flex",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "parallel_tool_calls": False,
        "stream_interval": 4,
        "session_id": "s",
        "vllm_xargs": {"a": 1},
    }
    assert chat(**hints).ignored_fields == ()
    for kind, params in (
        (ChatCompletionRequest, openai_chat.CompletionCreateParamsBase),
        (CompletionRequest, openai_completions.CompletionCreateParamsBase),
    ):
        known = {*kind.model_fields, *kind.NEUTRAL, *kind.HINTS}
        assert set(params.__annotations__) <= known


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("echo", False, True),
        ("best_of", 1, 2),
        ("suffix", "", "end"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("use_beam_search", False, True),
        ("bad_words", [], ["x"]),
        ("length_penalty", 1.0, 0.5),
        ("structured_outputs", None, {"a": 1}),
        ("tool_choice", "auto", "required"),
        ("functions", [], [{}]),
    ],
)
def test_fields_that_are_not_served_answer_400_unless_neutral(field, neutral, other):
    make = chat if field in ("tool_choice", "functions") else completion
    make(**{field: neutral})
    error = refusal(make, **{field: other})
    assert (error.param, error.status) == (field, 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("temperature", 2.1),
        ("repetition_penalty", float("inf")),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("logprobs", 21),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("stream", 1),
        ("cache_salt", 5),
        ("stop_token_ids", [-1]),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    error = refusal(completion, **{field: value})
    assert (error.status, error.param.split("[")[0]) == (400, field)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 2.1, "temperature: must be in [0, 2], got 2.1"),
        ("temperature", float("nan"), "temperature: must be in [0, 2], got nan"),
        ("top_p", 0, "top_p: must be in (0, 1], got 0"),
        ("repetition_penalty", -1e-38, "repetition_penalty: must be in (0, inf), got -1e-38"),
        ("presence_penalty", 3, "presence_penalty: must be in [-2, 2], got 3"),
    ],
)
def test_refusal_names_field_range_and_value(field, value, message):
    assert str(refusal(completion, **{field: value})) == message


def test_logit_bias_has_token_ids_for_keys():
    assert completion(logit_bias={"5": -100}).logit_bias == {5: -100.0}
    assert refusal(completion, logit_bias={"x": 1}).param == "logit_bias"
    assert "logit_bias" in str(refusal(completion, logit_bias={"5": 101}))


def test_min_tokens_over_max_tokens_is_refused_but_for_a_remote_prefill():
    assert refusal(completion, min_tokens=5, max_tokens=4).param == "min_tokens"
    request = completion(
        min_tokens=5,
        max_tokens=1,
        stream_options={"include_usage": True},
        kv_transfer_params={"do_remote_decode": True},
    )
    assert request.is_remote_prefill
    assert request.kv_transfer().do_remote_decode


def test_top_logprobs_need_logprobs():
    assert refusal(chat, top_logprobs=2).param == "top_logprobs"
    assert chat(logprobs=True, top_logprobs=2).num_top_logprobs == 2
    assert chat(logprobs=True).num_top_logprobs == 0
    assert chat(top_logprobs=0).num_top_logprobs is None


@pytest.mark.parametrize("field", ["kv_transfer_params", "resume"])
def test_internal_fields_are_refused_in_public(field):
    assert refusal(completion, public=True, **{field: {"do_remote_decode": True}}).param == field
    assert completion(public=True, **{field: None}).model_dump()[field] is None


def test_resume_has_the_tokens_of_every_choice():
    resume = completion(n=2, resume={"choices": [[{"token_id": 1}], []]}).resumed()
    assert resume is not None
    assert resume.sent
    assert [len(choice) for choice in resume.choices] == [1, 0]
    assert refusal(lambda: completion(resume={"choices": []}).resumed()).param == "resume.choices"
    assert refusal(lambda: completion(resume={"choices": [[{}]]}).resumed()).param == "resume"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"5", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a":"\\ud800"}']
)
def test_bodies_that_are_no_json_object(raw):
    with pytest.raises(RequestError) as caught:
        read_json_object(raw)
    assert caught.value.status == 400


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
@given(data=st.data())
def test_any_body_is_a_request_or_a_request_error(kind, data):
    names = st.sampled_from([*kind.model_fields, *kind.NEUTRAL]) | st.text(max_size=5)
    required = st.fixed_dictionaries(
        {}, optional={"prompt": st.just("x"), "messages": st.just(USER)}
    )
    body = data.draw(required) | data.draw(st.dictionaries(names, json, max_size=5))
    with contextlib.suppress(RequestError):
        assert parse_request(kind, body, public=False).n >= 1


@pytest.mark.parametrize(
    ("make", "fields", "param", "numbers"),
    [
        (
            completion,
            {"logit_bias": {str(index): 1 for index in range(1025)}},
            "logit_bias",
            ("1025", "1024"),
        ),
        (completion, {"user": "x" * 1025}, "user", ("1024",)),
        (
            chat,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"function": {"name": "f", "arguments": "[]" * 60_000}},
                            {"function": {"name": "f", "arguments": "[]" * 60_000}},
                        ],
                    }
                ]
            },
            "messages",
            ("100000",),
        ),
        (completion, {"stop": ["x"] * 33}, "stop", ("33", "32")),
        (completion, {"stop": ["x" * 1001]}, "stop[0]", ("1000",)),
        (completion, {"prompt": ["x"] * 1025}, "prompt", ("1024",)),
        (chat, {"messages": USER * 4097}, "messages", ("4097", "4096")),
        (
            chat,
            {"messages": [{"role": "user", "content": [TEXT] * 4097}]},
            "messages[0].content",
            ("4097", "4096"),
        ),
        (
            chat,
            {"messages": [{"role": "user", "content": [TEXT] * 2050}] * 2},
            "messages",
            ("4100", "4096"),
        ),
    ],
)
def test_what_is_too_many_is_refused_with_both_numbers(make, fields, param, numbers):
    error = refusal(make, **fields)
    assert error.param == param
    assert all(number in str(error) for number in numbers)


class _Noted(str):
    """Text that tells when it is gone, which a plain string cannot."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    "refused",
    [
        {"echo": True},
        {"max_tokens": -1},
        {"response_format": {"type": "json_object"}},
        {"messages": [], "stop": [1]},
        {"n": 2, "best_of": 3},
    ],
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
