"""The measurement of what recording costs records what engines and the router really record."""

from __future__ import annotations

import sys

import msgspec
import pytest

from pdlaunch.bench.step import recording
from pdlaunch.observe.spans import SpanReport


def test_the_parts_are_those_of_a_request() -> None:
    of_rank = recording.rank_reports()
    of_server = recording.server_report(of_rank)
    names = [span.name for span in msgspec.json.decode(of_server, type=SpanReport).spans]
    assert names[:2] == ["receive", "tokenize"]
    assert {"pull", "read", "prefill", "first decode step", "decode", "end"} <= set(names)
    line = recording.router_line(of_server, *recording.answered(16))
    assert "prefill-0 -> decode-0" in line
    assert "tokens=16" in line


def test_the_command_prints_each_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recording", "--batch-size", "2", "--num-steps", "8"])
    monkeypatch.setattr(recording, "_NUM_REQUESTS", 2)
    recording.main()
    printed = capsys.readouterr().out
    for part in ("rank 0, a step", "rank 0, a request", "server, a request", "router, a request"):
        assert part in printed
