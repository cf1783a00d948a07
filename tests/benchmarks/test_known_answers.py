"""A soak proves something only when a wrong answer is told from a right one."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks.known_answers import LOGPROB_TOLERANCE, ReceivedAnswer, collect_stream, difference
from pdlaunch.errors import ProtocolError

WHOLE = {
    "index": 0,
    "token_ids": [4, 5, 6],
    "text": "abc",
    "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]},
    "finish_reason": "length",
}


def answer(**changes: Any) -> ReceivedAnswer:
    received = ReceivedAnswer()
    received.add([WHOLE | changes])
    return received


async def begun_stream() -> AsyncIterator[bytes]:
    """One token, and no end."""
    first = {"index": 0, "token_ids": [4], "text": "a", "logprobs": {"token_logprobs": [-1.0]}}
    yield f"data: {json.dumps({'choices': [first]})}\n".encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [4, 5, 7]},
        {"token_ids": [4, 5]},
        {"text": "abd"},
        {"finish_reason": "stop"},
        {"logprobs": {"token_logprobs": [-1.0, -2.0, -3.0 - 2 * LOGPROB_TOLERANCE]}},
        {"logprobs": {"token_logprobs": [-1.0, -2.0]}},
        {"logprobs": None},
        {"index": 1},
    ],
)
def test_whatever_is_wrong_is_told(changes: dict[str, Any]) -> None:
    assert difference(answer(**changes), answer(), is_whole=True)


async def test_of_an_answer_that_was_cancelled_only_what_came_is_compared() -> None:
    begun = ReceivedAnswer()
    with pytest.raises(ProtocolError, match="without"):
        await collect_stream(begun_stream(), begun)
    assert difference(begun, answer(), is_whole=False) == ""
    assert difference(begun, answer(token_ids=[9, 5, 6]), is_whole=False)
    assert difference(begun, answer(), is_whole=True)
