from __future__ import annotations

import logging

import pytest

from pdlaunch.http.ignored_fields import (
    IGNORED_FIELDS_HEADER,
    MAX_LOGGED_NAMES,
    MAX_SENT_NAMES,
    IgnoredFields,
    read_ignored_fields,
)


def test_a_name_is_logged_once_and_sent_each_time(caplog: pytest.LogCaptureFixture) -> None:
    fields = IgnoredFields()
    for _ in range(3):
        headers = fields.headers(["no_stop_trim", "messages.cache"])
        assert headers == {IGNORED_FIELDS_HEADER: "no_stop_trim, messages.cache"}
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == [
        "'no_stop_trim'",
        "'messages.cache'",
    ]
    assert read_ignored_fields(headers[IGNORED_FIELDS_HEADER]) == ["no_stop_trim", "messages.cache"]
    assert fields.headers([]) == {}
    assert read_ignored_fields(None) == []


HOSTILE = [
    "a\r\nSet-Cookie: x",
    "a, b",
    "",
    "température",
    "x" * 65,
    "x" * 2**20,
    "a\x1b[2Jb",
    "\0",
]


def test_hostile_names_reach_no_header_and_stay_on_their_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert IgnoredFields().headers(HOSTILE) == {}
    for record in caplog.records:
        line = record.getMessage()
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 400


def test_very_many_names_fill_neither_header_nor_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fields = IgnoredFields()
    for start in range(0, 10_000, 100):
        headers = fields.headers(f"{number:064}" for number in range(start, start + 100))
        assert headers[IGNORED_FIELDS_HEADER].count(",") == MAX_SENT_NAMES - 1
        assert len(headers[IGNORED_FIELDS_HEADER]) < 1400
    assert len(caplog.records) == MAX_LOGGED_NAMES + 1
    assert "further names" in caplog.records[-1].getMessage()
