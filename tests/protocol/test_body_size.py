"""How much a body may hold, and that this is known before it is parsed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import num_token_ids, num_values, read_json_object


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


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed():
    with pytest.raises(RequestError, match="strings, lists and objects") as raised:
        read_json_object(b'{"x": [' + b",".join([b"[]"] * 100_000) + b"]}")
    assert raised.value.code == "too_many_values"


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
