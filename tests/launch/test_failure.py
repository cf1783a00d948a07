from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.launch.hosts.local import ProcessExited
from pdlaunch.launch.status import MAX_LINES, MAX_WIDTH, Failure

TRACEBACK = [
    "Traceback (most recent call last):",
    *(f"  File {n}" for n in range(40)),
    "RuntimeError: no memory",
]


@pytest.mark.parametrize(
    ("said", "lines", "told"),
    [
        ("no tokenizer.json", ["noise"], ["no tokenizer.json"]),
        ("", ["old error", *TRACEBACK], TRACEBACK[-1:]),
        (
            "",
            [*TRACEBACK, "error: x.gguf is damaged", "fix: get another"],
            ["error: x.gguf is damaged", "fix: get another"],
        ),
    ],
    ids=["its own words", "the end of a traceback", "an error in words"],
)
def test_what_is_told_of_a_log(
    tmp_path: Path, said: str, lines: list[str], told: list[str]
) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join(lines))
    report = Failure("it died", said=said).report(log)
    assert report == ["it died", *(f"  {line}" for line in told), f"log: {log}"]


@given(said=st.text(), details=st.lists(st.text(), max_size=50))
def test_it_never_has_more_than_twenty_lines(said: str, details: list[str]) -> None:
    report = Failure("it died", said=said, details=details).report(Path("/no/such/log"))
    assert len(report) <= MAX_LINES
    assert all(len(line) <= MAX_WIDTH for line in report)
    assert report[-1] == "log: /no/such/log"


def test_deaths_are_told_in_words() -> None:
    assert ProcessExited("x", 1, 3).how() == "ended with exit code 3"
    assert ProcessExited("x", 1, -11).how() == "was killed by SIGSEGV"
    assert ProcessExited("x", 1, -40).how() == "was killed by signal 40"
