"""What is new to the client, and answers put together from chunks."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.router.answers import merge
from pdlaunch.router.continuation import Transcript


def chat_chunk(
    index: int = 0, *, reason: str | None = None, token_ids: list[int] | None = None, **delta: Any
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return {"choices": [choice]}


def test_tokens_of_an_answer_that_is_all_hidden_are_counted_by_its_engine() -> None:
    """vLLM without ``include_reasoning`` tells no ids: an answer may end before its text begins."""
    transcript = Transcript(1)
    transcript.admit(chat_chunk(role="assistant", content=""))
    transcript.admit(chat_chunk(reason="length"))
    transcript.admit({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 100}})
    usage = transcript.usage()
    assert (usage.completion_tokens, usage.total_tokens) == (100, 107)


def test_held_back_text_may_come_without_tokens_but_unknown_tokens_end_resuming() -> None:
    transcript = Transcript(1)
    transcript.admit(chat_chunk(content="", token_ids=[1]))
    transcript.admit(chat_chunk(content="late"))
    assert not transcript.has_untold_tokens
    assert transcript.resume_field() == {"choices": [[{"token_id": 1}]], "sent": True}
    unknown = Transcript(1)
    unknown.admit(chat_chunk(content="x"))
    assert unknown.has_untold_tokens
    assert unknown.has_tokens
    unknown.admit({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 8}})
    assert unknown.usage().total_tokens == 11


def test_no_token_of_a_refused_chunk_counts_as_told() -> None:
    transcript = Transcript(2)
    good = {"index": 0, "text": "a", "token_ids": [1]}
    for bad in ({"index": 1, "text": "b", "token_ids": 7}, {"index": 1, "text": 7}, {"index": 2}):
        with pytest.raises((LookupError, TypeError)):
            transcript.admit({"choices": [good, bad]})
    assert transcript.usage().completion_tokens == 0


def test_tool_calls_grow_by_their_index() -> None:
    target: dict[str, Any] = {}
    for news in (
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}],
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ):
        merge(target, news)
    assert target == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


TOKEN_CHUNKS = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"index": st.integers(0, 1)},
                optional={
                    "text": st.sampled_from(["", "a", None, 5]),
                    "delta": st.sampled_from(
                        [None, {}, {"content": "a"}, {"role": "assistant", "content": "a"}, "x"]
                    ),
                    "token_ids": st.sampled_from([None, [], [7], [7, 8], 5]),
                    "finish_reason": st.sampled_from([None, "stop"]),
                    "logprobs": st.sampled_from([None, {"tokens": ["a"], "text_offset": [0]}]),
                    "prompt_token_ids": st.sampled_from([None, [1]]),
                },
            ),
            max_size=2,
        )
    },
    optional={
        "usage": st.sampled_from([None, {"prompt_tokens": 3, "completion_tokens": 1}]),
        "prompt_token_ids": st.sampled_from([None, [1]]),
    },
)


@given(st.lists(TOKEN_CHUNKS, max_size=4), st.integers(1, 2), st.booleans())
def test_what_is_told_at_once_is_what_is_admitted_with_care(
    chunks: list[dict[str, Any]], num_choices: int, keeps_text: bool
) -> None:
    fast, careful = (Transcript(num_choices, keeps_text=keeps_text) for _ in range(2))
    for chunk in chunks:
        other = copy.deepcopy(chunk)
        if fast.extend(chunk):
            assert careful.admit(other)
            assert chunk == other
        else:
            assert chunk == other
            try:
                told = careful.admit(other)
            except (LookupError, TypeError, AttributeError):
                return
            assert fast.admit(chunk) == told
            assert chunk == other
    assert fast.usage() == careful.usage()
    assert (fast.num_tokens, fast.text, fast.has_tokens, fast.is_done) == (
        careful.num_tokens,
        careful.text,
        careful.has_tokens,
        careful.is_done,
    )
    assert fast.resume_field() == careful.resume_field()
