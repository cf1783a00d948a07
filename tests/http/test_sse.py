"""Server-sent events survive every way of cutting the byte stream."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import ProtocolError, RequestError
from pdlaunch.http.errors import error_body
from pdlaunch.http.sse import (
    DONE,
    DONE_DATA,
    MAX_EVENT_BYTES,
    EventDecoder,
    encode_error,
    encode_event,
)


@given(st.lists(st.text()), st.integers(min_value=1, max_value=20))
def test_events_come_out_as_they_went_in(texts: list[str], size: int) -> None:
    stream = b"".join(encode_event({"text": text}) for text in texts) + DONE
    decoder = EventDecoder()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    events = [event for piece in pieces for event in decoder.feed(piece)]
    assert events.pop() == DONE_DATA
    assert [msgspec.json.decode(event)["text"] for event in events] == texts


def test_other_servers_line_ends_comments_and_members() -> None:
    assert EventDecoder().feed(b": ping\r\nevent: x\r\ndata:a\r\ndata: b\r\n\r\n\r\n") == [b"a\nb"]


def test_an_endless_event_is_refused() -> None:
    with pytest.raises(ProtocolError):
        EventDecoder().feed(b"data: " + b"x" * MAX_EVENT_BYTES)


def test_errors_have_openais_form_and_show_nothing_unexpected() -> None:
    error = RequestError("bad", param="n", code="c")
    assert error_body(error) == {
        "error": {"message": "bad", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
    assert b"secret" not in encode_error(KeyError("secret"))
