from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import RequestError
from pdlaunch.http.headers import (
    IGNORED_FIELDS_HEADER,
    MAX_SENT_NAMES,
    ignored_fields_header,
    read_ignored_fields,
    read_request_id,
    read_traceparent,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_id_is_kept_or_made() -> None:
    assert read_request_id("abc-1") == "abc-1"
    assert len(read_request_id(None)) == 32
    assert read_request_id("") != read_request_id("")


@pytest.mark.parametrize("header", ["a b", "a\r\nb", "é", "x" * 201])
def test_bad_request_ids_are_refused(header: str) -> None:
    with pytest.raises(RequestError, match="X-Request-Id"):
        read_request_id(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "x",
        TRACEPARENT.upper(),
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "ff" + TRACEPARENT[2:],
    ],
)
def test_a_malformed_traceparent_is_ignored(header: str | None) -> None:
    assert read_traceparent(TRACEPARENT) == TRACEPARENT
    assert read_traceparent(header) is None


@given(st.text())
def test_any_header_is_read_or_refused(header: str) -> None:
    read_traceparent(header)
    with contextlib.suppress(RequestError):
        assert read_request_id(header).isascii()


def test_names_of_ignored_fields_go_there_and_back() -> None:
    headers = ignored_fields_header(["no_stop_trim", "messages.cache", "no_stop_trim"])
    assert headers == {IGNORED_FIELDS_HEADER: "no_stop_trim, messages.cache"}
    assert read_ignored_fields(headers[IGNORED_FIELDS_HEADER]) == ["no_stop_trim", "messages.cache"]
    assert (ignored_fields_header([]), read_ignored_fields(None)) == ({}, [])


HOSTILE = ["a\r\nSet-Cookie: x", "a, b", "", "température", "x" * 2**20, "a\x1b[2Jb", "\0"]


def test_hostile_or_very_many_names_fill_no_header() -> None:
    assert ignored_fields_header(HOSTILE) == {}
    (told,) = ignored_fields_header(f"{number:064}" for number in range(10_000)).values()
    assert told.count(",") == MAX_SENT_NAMES - 1
    assert len(told) < 1400
