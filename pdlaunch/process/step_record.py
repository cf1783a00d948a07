"""Which requests a rank computes, in a file that outlives it: who reads it knows the last step of a rank that died by itself.

Rank 0 of an engine writes it before each step, through mapped memory and without a system call; the supervisor reads it.

    words of 64 bits   number of requests │ request, its top bit: it is a suspect │ ..

A request stands here with the number that the router gave it (``origin``); those of other routers have none and are left out.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec

SUSPECT_BIT = 1 << 63
_WORD_BYTES = 8


class LastStep(msgspec.Struct, frozen=True):
    """What a rank computed when it died."""

    origins: frozenset[int] = frozenset()
    suspects: frozenset[int] = frozenset()
    """Those of ``origins`` that a rank had died of before, perhaps: there was one of them at most."""


def record_path(run_dir: str | Path, engine: str) -> Path:
    """The file of an engine's present incarnation."""
    return Path(run_dir) / f"{engine}.step"


class StepRecord:
    """The file as its rank writes it. ``max_requests``: most that are in flight at once."""

    def __init__(self, path: Path, max_requests: int) -> None:
        with path.open("wb") as file:
            file.truncate((1 + max_requests) * _WORD_BYTES)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("Q")

    def write(self, marks: Sequence[int]) -> None:
        """``marks``: the origin of each request in flight, with ``SUSPECT_BIT`` for a suspect."""
        self._words[1 : 1 + len(marks)] = array("Q", marks)
        self._words[0] = len(marks)


def read_step_record(path: Path) -> LastStep:
    """What was written last; nothing where there is no such file."""
    try:
        words = array("Q", path.read_bytes())
    except OSError:
        return LastStep()
    marks = [mark for mark in words[1 : 1 + words[0]] if mark]
    return LastStep(
        frozenset(mark & ~SUSPECT_BIT for mark in marks),
        frozenset(mark & ~SUSPECT_BIT for mark in marks if mark & SUSPECT_BIT),
    )
