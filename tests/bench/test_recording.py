"""The measurement of what recording costs records what engines and the router really record."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import msgspec
import pytest

from pdlaunch.bench.step import recording
from pdlaunch.observe.spans import SpanReport
from pdlaunch.router.request_lines import format_request
from tests.router.otlp_collector import running_collector


def test_the_parts_are_those_of_a_request() -> None:
    of_rank = recording.rank_reports()
    of_server = recording.server_report(of_rank)
    names = [span.name for span in msgspec.json.decode(of_server, type=SpanReport).spans]
    assert names[:2] == ["receive", "tokenize"]
    assert {"pull", "read", "prefill", "first decode step", "decode", "end"} <= set(names)
    record = recording.router_record(of_server, *recording.answered(16))
    line = format_request(record.summary())
    assert "prefill-0 -> decode-0" in line
    assert "tokens=16" in line


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs set up the logging of their process; this one is that of all tests."""
    root, ours = logging.getLogger(), logging.getLogger("pdlaunch")
    monkeypatch.setattr(root, "handlers", [])
    levels = (root.level, ours.level)
    yield
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def test_the_command_prints_each_part(
    logging_as_before: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_NUM_REQUESTS", 2)
    monkeypatch.setattr(recording, "_FLUSH_EVERY", 1)
    with running_collector() as collector:
        words = ["--batch-size", "2", "--num-steps", "8", "--otlp-endpoint", collector.url]
        monkeypatch.setattr(sys, "argv", ["recording", *words])
        recording.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip().split("  ")[0] for line in lines[1:]] == [
        "rank 0, a step",
        "rank 0, a request",
        "server, a request",
        "router, a request",
        "router, its line in the log",
        "router, its spans over OTLP",
    ]
    assert {span.process for span in collector.spans} >= {"router", "prefill-0", "decode-0"}
