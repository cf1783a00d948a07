from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import RequestError
from pdlaunch.http.headers import read_request_id, read_traceparent

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_id_is_kept_or_made():
    assert read_request_id("abc-1") == "abc-1"
    assert len(read_request_id(None)) == 32
    assert read_request_id("") != read_request_id("")


@pytest.mark.parametrize("header", ["a b", "a\r\nb", "é", "x" * 201])
def test_bad_request_ids_are_refused(header):
    with pytest.raises(RequestError):
        read_request_id(header)


def test_a_traceparent_passes_unchanged():
    assert read_traceparent(TRACEPARENT) == TRACEPARENT


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
def test_a_malformed_traceparent_is_ignored(header):
    assert read_traceparent(header) is None


@given(st.text())
def test_any_header_is_read_or_refused(header):
    read_traceparent(header)
    with contextlib.suppress(RequestError):
        assert read_request_id(header).isascii()
