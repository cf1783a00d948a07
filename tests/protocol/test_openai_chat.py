"""Which messages of a chat are accepted, and what a template is given of them."""

from __future__ import annotations

import pytest

from tests.protocol.openai_bodies import TEXT, USER, chat, refusal


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "audio": {"id": "x"}}], "messages[0].audio"),
    ],
)
def test_what_a_message_may_not_be(messages, param):
    assert refusal(chat, messages=messages).param == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "image"])
def test_images_and_the_like_get_an_error_that_says_so(kind):
    for part in ({"type": kind, kind: {"url": "data:"}}, {kind: {"url": "data:"}}):
        error = refusal(chat, messages=[*USER, {"role": "user", "content": [TEXT, part]}])
        assert error.param == "messages[1].content[1].type"
        assert str(error).startswith(
            f"messages[1].content[1]: content of type '{kind}' is not supported: the model reads "
            "text alone, no images, audio, video or files"
        )


def test_every_form_of_text_is_a_text():
    parts = ["a", TEXT, {"text": "b"}, {"type": "input_text", "text": "c"}]
    (message,) = chat(messages=[{"role": "user", "content": parts}]).messages
    assert message.text() == "a\nhi\nb\nc"
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert chat(messages=[refused]).messages[0].text() == "no"


CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern", "days": [1, 2]}'},
}


def test_a_history_with_tool_calls_is_shown_to_the_template():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    request = chat(messages=messages, tools=[tool])
    called, result = (message.for_template() for message in request.messages[1:])
    assert called["content"] == ""
    assert called["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "Bern", "days": [1, 2]},
    }
    assert called["reasoning"] == called["reasoning_content"] == "hm"
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    assert [tool.for_template() for tool in request.tools] == [tool]


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}]
)
def test_calls_that_would_have_to_be_parsed_are_refused(choice):
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat(tools=tools, tool_choice="none")
    assert refusal(chat, tools=tools, tool_choice=choice).param == "tool_choice"


def test_an_effort_reaches_the_template_unless_its_own_variables_say_otherwise():
    assert chat().template_variables == {}
    assert chat(reasoning_effort="none").template_variables["enable_thinking"] is False
    request = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert request.template_variables == {"reasoning_effort": "low", "enable_thinking": False}


def test_an_answer_sent_back_with_its_nulls_is_accepted():
    message = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "audio": None,
    }
    assert chat(messages=[*USER, message]).messages[1].text() == "x"
