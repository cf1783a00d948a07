"""Headers as clients and engines send them; server-sent events, however the stream is cut."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import ProtocolError, RequestError
from pdlaunch.http.errors import error_body, error_payload
from pdlaunch.http.headers import (
    MAX_SENT_NAMES,
    headers_to_pass,
    ignored_fields_header,
    read_request_id,
)
from pdlaunch.http.sse import (
    DONE,
    DONE_DATA,
    MAX_EVENT_BYTES,
    EventDecoder,
    encode_event,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_headers_of_a_trace_are_passed_on_where_they_can_be_sent() -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=\udcff", "cookie": "secret"}
    assert headers_to_pass(headers) == {"traceparent": TRACEPARENT}


@given(st.text() | st.sampled_from(["a b", "a\r\nb", "x" * 201]))
def test_a_request_id_is_a_short_word_or_refused(header: str) -> None:
    with contextlib.suppress(RequestError):
        request_id = read_request_id(header)
        assert request_id.isascii()
        assert request_id.isprintable()
        assert len(request_id.split()) == 1
        assert len(request_id) <= 200


HOSTILE = ["a\r\nSet-Cookie: x", "a, b", "", "température", "x" * 2**20, "a\x1b[2Jb", "\0"]


def test_hostile_or_very_many_names_fill_no_header() -> None:
    assert ignored_fields_header(HOSTILE) == {}
    (told,) = ignored_fields_header(f"{number:064}" for number in range(10_000)).values()
    assert told.count(",") == MAX_SENT_NAMES - 1
    assert len(told) < 1400


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
    assert "secret" not in str(error_payload(KeyError("secret")))
