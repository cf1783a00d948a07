"""A copy stream carries the transfers of one direction, in order, and reports when each has ended.

Between two CPU tensors the stream's thread copies. On CUDA the submitting thread enqueues on a CUDA
stream, behind what the current stream holds, and the thread waits for the event after the copy.
Nobody else ever waits.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pdlaunch.engine.offload.copies import PageCopies
from pdlaunch.engine.offload.copy_methods import CopyMethod
from pdlaunch.engine.offload.spec import Direction
from pdlaunch.errors import TransferError


@dataclass(frozen=True, slots=True)
class TransferResult:
    """One transfer has ended; its memory is not touched any more."""

    job_id: int
    direction: Direction
    ok: bool
    num_bytes: int
    seconds: float
    """Duration of the copy alone, without waiting for others."""
    error: str = ""


ChooseMethod = Callable[[PageCopies, Direction, bool], CopyMethod]
"""Chooses the method from the pages, the direction, and whether the other direction copies too."""
Report = Callable[[TransferResult], None]


class CopyStream(ABC):
    """Runs the transfers of one direction. ``report`` is called from the stream's thread, once for
    each transfer, in order. ``other_is_busy`` says whether the other direction copies.
    """

    def __init__(
        self,
        direction: Direction,
        choose: ChooseMethod,
        report: Report,
        other_is_busy: Callable[[], bool],
    ) -> None:
        self._direction = direction
        self._choose = choose
        self._report = report
        self._other_is_busy = other_is_busy
        # Each is written by one thread.
        self._num_submitted = self._num_ended = 0
        self._ends: queue.SimpleQueue[tuple[int, int, Callable[[], float]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=f"offload-{direction}", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Return whether a transfer has not ended yet."""
        return self._num_submitted != self._num_ended

    @abstractmethod
    def start(self, copies: Sequence[PageCopies]) -> Callable[[], float]:
        """Begin to copy, and return a function that the stream's thread calls: it waits for the end
        and returns the seconds that the copy took. May raise RuntimeError or TransferError.
        """

    def submit(self, job_id: int, copies: Sequence[PageCopies]) -> None:
        """Queue one transfer; an error is reported as its result."""
        num_bytes = sum(pages.num_bytes for pages in copies)
        self._num_submitted += 1
        try:
            end = self.start(copies)
        except (RuntimeError, TransferError) as error:
            end = _failing(error)
        self._ends.put((job_id, num_bytes, end))

    def close(self, timeout_s: float) -> bool:
        """End the thread after the queued transfers; return False when that takes longer."""
        self._ends.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._ends.get()) is not None:
            job_id, num_bytes, end = item
            try:
                result = TransferResult(job_id, self._direction, True, num_bytes, end())
            except Exception as error:
                # Whatever it is, the blocks must not be used, and their owner must hear of it.
                result = TransferResult(
                    job_id, self._direction, False, 0, 0.0, f"{type(error).__name__}: {error}"
                )
            self._num_ended += 1
            self._report(result)

    def _copy_all(self, copies: Sequence[PageCopies]) -> None:
        for pages in copies:
            self._choose(pages, self._direction, self._other_is_busy()).copy(pages, self._direction)


class HostCopyStream(CopyStream):
    """Copies between two CPU tensors."""

    def start(self, copies: Sequence[PageCopies]) -> Callable[[], float]:
        def copy() -> float:
            began_at = time.perf_counter()
            self._copy_all(copies)
            return time.perf_counter() - began_at

        return copy


class CudaCopyStream(CopyStream):
    """Copies between a CUDA device and pinned memory on a CUDA stream of its own."""

    def __init__(
        self,
        direction: Direction,
        choose: ChooseMethod,
        report: Report,
        other_is_busy: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        super().__init__(direction, choose, report, other_is_busy)

    def start(self, copies: Sequence[PageCopies]) -> Callable[[], float]:
        # What the blocks were last used for may still be queued there.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Blocking: the thread that waits for it sleeps, and does not take a core from the step
        # loop.
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            begin.record(self._stream)
            try:
                self._copy_all(copies)
            except (RuntimeError, TransferError) as error:
                return _failing(
                    error, first=self._stream.synchronize
                )  # a part of it may be on its way
            end.record(self._stream)

        def wait() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return wait


def _failing(error: Exception, first: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """Return a function that calls ``first``, which waits until nothing is written any more, and
    raises ``error``.
    """

    def fail() -> float:
        first()
        raise error

    return fail
