"""Causes of failed starts: logs of real ones, whose first lines say what should be found."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.launch.hosts.local import ProcessExited
from pdlaunch.launch.status import MAX_LINES, MAX_WIDTH, Failure
from pdlaunch.observe.causes import find_cause

LOGS = sorted((Path(__file__).parent / "failed_starts").glob("*.log"))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_the_cause_and_its_fix_are_found(path: Path) -> None:
    source, cause, fix, *lines = path.read_text().splitlines()
    assert source.startswith("# ")
    found = find_cause(["error: of the life before", "--- incarnation 2", *lines])
    assert found is not None
    assert found.error.startswith(cause.removeprefix("# cause: "))
    expected = fix.removeprefix("# fix:").strip()
    assert expected in found.fix
    assert bool(expected) == bool(found.fix)
    # On the terminal: what failed, the cause, the fix.
    report = Failure("prefill-0 failed to start").report(path)
    assert report[1].startswith(f"  {cause.removeprefix('# cause: ')}")
    assert len(report) == 3 + bool(expected)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("vllm exited with status 1: torch.OutOfMemoryError: CUDA out of memory", "Give an engine"),
        # Native engines
        ("p-0 cannot listen on 127.0.0.1:82: Address already in use", "Another process uses this"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you ..", "Lower kv_cache_mem"),
        ("SafetensorError: Error while deserializing header: invalid ..", "Weight files are miss"),
    ],
)
def test_words_of_a_process_get_the_fix_that_is_known_for_them(said: str, fix: str) -> None:
    report = Failure("decode-0 failed to start", said=said).report(Path("/no/such.log"))
    assert report[:2] == ["decode-0 failed to start", f"  {said}"]
    assert report[2].startswith(f"  fix: {fix}")
    assert len(report) == 4


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
