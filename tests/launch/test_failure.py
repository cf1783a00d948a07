from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.launch.hosts.local import ProcessExited
from pdlaunch.launch.status import MAX_LINES, MAX_WIDTH, Failure

TRACEBACK = [
    "Traceback (most recent call last):",
    *(f"  File {n}" for n in range(40)),
    "RuntimeError: no memory",
]


def test_its_own_words_come_before_the_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("noise\n")
    report = Failure(
        "decode-0 failed to start", process="decode-0", said="no tokenizer.json"
    ).report(log)
    assert report == ["decode-0 failed to start", "  no tokenizer.json", f"log: {log}"]


def test_a_long_traceback_is_cut_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join(["old error", *TRACEBACK]))
    report = Failure("it died").report(log)
    assert len(report) <= MAX_LINES
    assert report[-2] == "  RuntimeError: no memory"
    assert not any("old error" in line for line in report)


def test_an_error_in_words_comes_instead_of_its_traceback(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join([*TRACEBACK, "error: x.gguf is damaged", "fix: get another"]))
    report = Failure("it died").report(log)
    assert report == ["it died", "  error: x.gguf is damaged", "  fix: get another", f"log: {log}"]


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
