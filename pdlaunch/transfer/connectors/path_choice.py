"""Finds the fastest path to a peer: reads its scratch over each, once to prove it, then to time it.

::

    for each path:   cold READ ── right bytes ──▶ warm READ x NUM_WARM_READS ──▶ GB/s of the fastest
                       └── refused, failed, late, wrong bytes ──▶ why it cannot be used
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import Read

NUM_WARM_READS = 3
"""READs that are timed; the best one counts, because a READ of half a millisecond is easily
disturbed.
"""
STEADY_S = 0.02
"""With a single path, a READ that takes this long is not repeated: disturbances are short beside
it.
"""
NEARLY = 0.95
"""Share of the best speed that counts as equal; it is more than the spread of a measurement. Among
equals the connector's preference counts.
"""


@dataclass(frozen=True, slots=True)
class PathFigure:
    """Holds the result of trying one path."""

    path: str
    gigabytes_per_s: float | None
    """None when the path cannot be used."""
    error: str = ""

    def __str__(self) -> str:
        return self.error if self.gigabytes_per_s is None else f"{self.gigabytes_per_s:.3g} GB/s"


class ScratchReads(Protocol):
    """Reads one peer's scratch."""

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        """Start a READ. Raises TransferError."""

    def release(self, read: Read) -> None:
        """Free a READ that has ended."""

    def abandon(self, read: Read, landing: torch.Tensor) -> None:
        """Take over a READ that is pending: keep its memory, and release it when it has ended."""


@dataclass(frozen=True, slots=True)
class _Running:
    path: str
    read: Read
    landing: torch.Tensor
    is_cold: bool


class PathTrial:
    """Tries all paths to one peer. Call ``advance`` until it says that it is over; it never
    waits.
    """

    def __init__(
        self,
        reads: ScratchReads,
        paths: Sequence[str],
        *,
        is_right: Callable[[torch.Tensor], bool],
        clock: Callable[[], float],
        timeout_s: float,
    ) -> None:
        """``is_right`` says whether these are the bytes of the peer's scratch. ``timeout_s`` is for
        all paths together.
        """
        self.figures: list[PathFigure] = []
        self._reads = reads
        self._paths = deque(paths)
        self._is_right = is_right
        self._clock = clock
        self._steady_s = None if len(paths) > 1 else STEADY_S
        # One of several paths that hangs must not cost the others; a single one has until the
        # handshake's own time-out.
        self._path_timeout_s = timeout_s / (len(paths) + 1) if len(paths) > 1 else None
        self._began_at = 0.0
        self._running: _Running | None = None
        self._times_s: list[float] = []

    def advance(self) -> bool:
        """Do what is due; True when every path has its figure."""
        while self._paths:
            if self._running is None:
                self._times_s = []
                self._began_at = self._clock()
                self._start(self._paths[0], is_cold=True)
            elif not self._end_read(self._running):
                return False
        return True

    def best(self) -> PathFigure:
        """Return the first of the paths that are nearly as fast as the fastest. Raises
        TransferError when there is none.
        """
        speeds = [
            figure.gigabytes_per_s for figure in self.figures if figure.gigabytes_per_s is not None
        ]
        for figure in self.figures:
            if figure.gigabytes_per_s is not None and figure.gigabytes_per_s >= NEARLY * max(
                speeds
            ):
                return figure
        if len(self.figures) == 1:
            raise TransferError(self.figures[0].error)
        raise TransferError("; ".join(f"{figure.path}: {figure.error}" for figure in self.figures))

    def abandon(self) -> None:
        """Hand over the READ that is pending, because the connection is given up."""
        self._paths.clear()
        self._let_go()

    def _start(self, path: str, *, is_cold: bool) -> None:
        try:
            read, landing = self._reads.read_scratch(path)
        except TransferError as error:
            self._end_path(error=str(error))
        else:
            self._running = _Running(path, read, landing, is_cold)

    def _end_read(self, running: _Running) -> bool:
        """Look at the READ; return False while it is pending and in time."""
        state = running.read.poll()
        if state == "pending":
            timeout_s = self._path_timeout_s
            if timeout_s is None or self._clock() < self._began_at + timeout_s:
                return False
            self._let_go()
            self._end_path(error=f"the first READ did not end within {timeout_s:.3g} s")
            return True
        read_s = running.read.seconds() if state == "done" else 0.0
        self._running = None
        self._reads.release(running.read)
        if state == "failed":
            self._end_path(error="the first READ failed")
        elif running.is_cold and not self._is_right(running.landing):
            self._end_path(error="the first READ brought wrong bytes")
        else:
            self._count(running, read_s)
        return True

    def _count(self, running: _Running, read_s: float) -> None:
        if not running.is_cold:
            self._times_s.append(read_s)
        is_steady = self._steady_s is not None and bool(
            self._times_s and max(self._times_s) >= self._steady_s
        )
        if len(self._times_s) < NUM_WARM_READS and not is_steady:
            self._start(running.path, is_cold=False)
        else:
            self._end_path(
                gigabytes_per_s=running.landing.numel() / 1e9 / max(min(self._times_s), 1e-9)
            )

    def _end_path(self, *, gigabytes_per_s: float | None = None, error: str = "") -> None:
        self.figures.append(PathFigure(self._paths.popleft(), gigabytes_per_s, error))

    def _let_go(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            self._reads.abandon(running.read, running.landing)
