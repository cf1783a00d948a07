"""Server-sent events survive every way of cutting the byte stream."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import ProtocolError, RequestError
from pdlaunch.http.errors import error_body, error_response, error_status
from pdlaunch.http.sse import (
    DONE,
    DONE_DATA,
    MAX_EVENT_BYTES,
    EventDecoder,
    encode_error,
    encode_event,
)
from pdlaunch.protocol.openai.responses import Completion, CompletionChoice


@given(st.lists(st.text()), st.integers(min_value=1, max_value=20))
def test_events_come_out_as_they_went_in(texts, size):
    stream = b"".join(encode_event({"text": text}) for text in texts) + DONE
    decoder = EventDecoder()
    events = [
        event
        for start in range(0, len(stream), size)
        for event in decoder.feed(stream[start : start + size])
    ]
    assert events.pop() == DONE_DATA
    assert [msgspec.json.decode(event)["text"] for event in events] == texts


def test_other_servers_line_ends_comments_and_members():
    assert EventDecoder().feed(b": ping\r\nevent: x\r\ndata:a\r\ndata: b\r\n\r\n\r\n") == [b"a\nb"]


def test_an_endless_event_is_refused():
    with pytest.raises(ProtocolError):
        EventDecoder().feed(b"data: " + b"x" * MAX_EVENT_BYTES)


def test_a_chunk_writes_what_is_set():
    chunk = Completion(id="cmpl-1", choices=[CompletionChoice(text="a")])
    written = msgspec.json.decode(encode_event(chunk).removeprefix(b"data: "))
    assert "usage" not in written
    assert written["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


def test_errors_have_openais_form():
    error = RequestError("bad", param="n", code="c")
    assert error_body(error) == {
        "error": {"message": "bad", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
    assert error_status(error) == 400


def test_unexpected_exceptions_show_nothing():
    response = error_response(KeyError("secret"))
    assert isinstance(response.body, bytes)
    assert msgspec.json.decode(response.body)["error"]["type"] == "server_error"
    assert b"secret" not in response.body
    assert b"secret" not in encode_error(KeyError("secret"))
