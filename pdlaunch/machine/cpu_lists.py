"""Reads and writes lists of cores as Linux does: ``0-3,8``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

MOST_CORES = 1 << 16
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the cores in order. Raises ValueError for what is no such list."""
    cores: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_CORES:
            raise ValueError(f"{text[:80]!r} is no list of cores such as 0-15,32-47")
        cores.update(range(first, last + 1))
    return tuple(sorted(cores))


def format_cpu_list(cores: Iterable[int]) -> str:
    """Return ``0-3,8``."""
    # Neighbours keep the same distance from their place in the sorted list.
    runs = itertools.groupby(enumerate(sorted(cores)), key=lambda item: item[1] - item[0])
    parts = ([core for _, core in run] for _, run in runs)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in parts)
