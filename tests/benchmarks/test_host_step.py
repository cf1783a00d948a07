"""The benchmark of the host's part of a step runs; its figures are nobody's business here."""

from __future__ import annotations

import sys

import pytest

from benchmarks.host_step import main


def test_every_part_of_a_step_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench_host", "--batch-size", "3", "--context-tokens", "20", "--num-steps", "18"],
    )
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == [
        *("schedule", "apply and pack", "postprocess", "encode outputs", "together")
    ]
