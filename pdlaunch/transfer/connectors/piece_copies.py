"""Copies scattered pieces of equal size from a peer's mapped memory to this rank's memory.

Here are the interface and the implementation for CPUs; ``cuda_copies.py`` has those for GPUs.
"""

from __future__ import annotations

import ctypes
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pdlaunch.engine.memory.batch_copies import Addresses
from pdlaunch.transfer.connectors.connector import Read, ReadState

logger = logging.getLogger(__name__)


PART_BYTES = 128 * 1024**2  # bytes of one part: a third of a millisecond at 400 GB/s


@dataclass(frozen=True)
class Pieces:
    """Names pieces of ``piece_bytes`` each: source i is copied to destination i. There is at least
    one.
    """

    destinations: Addresses
    sources: Addresses  # addresses in the peer's mapped memory, as many as ``destinations``
    piece_bytes: int

    @cached_property
    def parts(self) -> list[Pieces]:
        """Split the pieces, in their order, into parts of about ``PART_BYTES``."""
        step = max(1, PART_BYTES // self.piece_bytes)
        return [
            Pieces(
                self.destinations[start : start + step],
                self.sources[start : start + step],
                self.piece_bytes,
            )
            for start in range(0, len(self.sources), step)
        ]

    @cached_property
    def merged(self) -> tuple[Addresses, Addresses, Addresses]:
        """Return destinations, sources and sizes of the fewest copies: pieces that are neighbours
        on both sides are one.
        """
        size = self.piece_bytes
        # A copy ends where the next piece does not follow on both sides.
        breaks = (np.diff(self.destinations) != size) | (np.diff(self.sources) != size)
        starts = np.flatnonzero(np.concatenate(([True], breaks)))
        sizes = np.diff(np.append(starts, len(self.sources))).astype(np.uint64) * np.uint64(size)
        return self.destinations[starts], self.sources[starts], sizes


class PieceCopier(ABC):
    """Copies pieces in one way. One thread calls its methods, none of which waits for a copy."""

    name: str  # ``batch3`` and such; empty where there is only one

    def supports(self, pieces: Pieces) -> bool:
        """Return whether it can copy pieces of this size and alignment."""
        return True

    @abstractmethod
    def start(self, pieces: Pieces) -> Read:
        """Begin to copy. Raises TransferError; then nothing is written."""

    @abstractmethod
    def close(self) -> None:
        """End the copies: nothing is copied any more when this returns."""


class HostCopier(PieceCopier):
    """Copies in a thread of its own, without the interpreter's lock."""

    name = ""

    def __init__(self, move: Callable[[int, int, int], object] = ctypes.memmove) -> None:
        """``move`` takes destination, source and bytes."""
        self._move = move
        self._thread = ThreadPoolExecutor(1, "p2p-copy")

    def start(self, pieces: Pieces) -> Read:
        return _ThreadCopy(self._thread.submit(self._copy, pieces))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, pieces: Pieces) -> float:
        began_at = time.perf_counter()
        for destination, source, size in zip(
            *(column.tolist() for column in pieces.merged), strict=True
        ):
            self._move(destination, source, size)
        return time.perf_counter() - began_at


class _ThreadCopy(Read):
    """Follows one copy of a ``HostCopier``, by the future of its thread."""

    def __init__(self, future: Future[float]) -> None:
        self._future = future

    def poll(self) -> ReadState:
        if not self._future.done():
            return "pending"
        if self._future.cancelled():
            return "failed"
        if (error := self._future.exception()) is not None:
            logger.warning("a copy from a peer's memory failed: %s", error)
            return "failed"
        return "done"

    def seconds(self) -> float:
        return self._future.result()
