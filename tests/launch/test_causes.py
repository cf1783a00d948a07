"""Causes of failed starts: logs of real ones, whose first lines say what should be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.launch.status import Failure
from pdlaunch.observe.causes import find_cause

LOGS = sorted((Path(__file__).parent / "failed_starts").glob("*.log"))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_the_cause_and_its_fix_are_found(path: Path) -> None:
    source, cause, fix, *lines = path.read_text().splitlines()
    assert source.startswith("# ")
    found = find_cause(lines)
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
