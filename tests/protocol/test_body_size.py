"""How much a body may hold, and that this is known before it is parsed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import num_token_ids, num_values, read_json_object

LISTS = {
    "in lists": "[" * 30 + "]" * 30,
    "of lists": "[[],[],[],[],[]]",
    "of objects": '[{"a":{}},{}]',
    "of strings": '["a","b"]',
}
VALUES = {"in lists": 30, "of lists": 6, "of objects": 5, "of strings": 3}
"""Strings, lists and objects of each."""


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("surplus", [0, 1])
def test_the_values_of_a_body_are_counted_before_it_is_parsed(
    kind: str, surplus: int, monkeypatch: pytest.MonkeyPatch
):
    """The body itself and the name of its member are two more."""
    times = 50
    monkeypatch.setattr(
        "pdlaunch.protocol.openai.body.MAX_JSON_VALUES", 3 + VALUES[kind] * times - surplus
    )
    raw = ('{"x": [' + ",".join([LISTS[kind]] * times) + "]}").encode()
    if surplus:
        with pytest.raises(RequestError, match="strings, lists and objects") as raised:
            read_json_object(raw)
        assert raised.value.code == "too_many_values"
    else:
        assert len(read_json_object(raw)["x"]) == times


@given(
    st.recursive(
        st.text() | st.integers() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_values_are_counted_as_they_are(value: object):
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


def test_long_texts_are_one_value():
    text = '"[{\\' * 200_000
    assert read_json_object(json.dumps({"prompt": text}).encode())["prompt"] == text


def test_the_tokens_of_an_answer_that_goes_on_are_not_counted():
    resume = {"choices": [[{"token_id": 5}] * 100_000], "sent": True}
    assert (
        len(
            read_json_object(json.dumps({"prompt": "x", "resume": resume}).encode())["resume"][
                "choices"
            ][0]
        )
        == 100_000
    )


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
def test_token_ids_are_counted_without_parsing_them(body: str, number: int):
    assert num_token_ids(body.encode(), "prompt") == number
