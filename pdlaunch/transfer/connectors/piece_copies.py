"""Copies scattered pieces from a peer's mapped memory to this rank's memory: on a CPU in a thread,
on a GPU with the copy engines or a kernel.

Copy engines leave all multiprocessors to the model, and reach the link's speed with large pieces
(H200, NVLink: 394 GB/s at 8 MiB, 338 at 1 MiB, 104 at 64 KiB). For small pieces a kernel is faster.
"""

import ctypes
import importlib.util
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.errors import TransferError
from pdlaunch.machine.probe import DriverError
from pdlaunch.transfer.connectors.connector import Read, ReadState
from pdlaunch.transfer.regions import Addresses, Pieces, merge

logger = logging.getLogger(__name__)

# The kernel copies pieces below this mean size: copy engines take 3 us for a 32 KiB page of vLLM.
KERNEL_BELOW_BYTES = 256 * 1024
NUM_STREAMS = 3  # A copy engine copies one piece at a time; several engines run in parallel.


class HostCopier:
    """Copies in its own thread, without the interpreter lock."""

    def __init__(self, move: Callable[[int, int, int], object] = ctypes.memmove) -> None:
        """``move`` takes destination, source and size in bytes."""
        self._move = move
        self._thread = ThreadPoolExecutor(1, "p2p-copy")

    def start(self, destinations: Pieces, sources: Pieces) -> Read:
        return _ThreadCopy(self._thread.submit(self._copy, destinations, sources))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, destinations: Pieces, sources: Pieces) -> float:
        began_at = time.perf_counter()
        columns = (column.tolist() for column in merge(destinations, sources))
        for destination, source, size in zip(*columns, strict=True):
            self._move(destination, source, size)
        return time.perf_counter() - began_at


@dataclass(eq=False)
class _ThreadCopy(Read):
    future: Future[float]

    def poll(self) -> ReadState:
        if not self.future.done():
            return "pending"
        if self.future.cancelled():
            return "failed"
        if (error := self.future.exception()) is not None:
            logger.warning("a copy from a peer's memory failed: %s", error)
            return "failed"
        return "done"

    def seconds(self) -> float:
        return self.future.result()


class CudaCopier:
    """Copies large pieces with the copy engines, small pieces with a kernel if Triton is there."""

    def __init__(self, device: torch.device) -> None:
        self._anchor = torch.zeros(4, dtype=torch.int32, device=device)
        self._has_kernel = importlib.util.find_spec("triton") is not None
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        try:
            self._batches = BatchCopies(NUM_STREAMS)
        except DriverError as error:
            raise TransferError(f"GPU copies are not possible: {error}") from error

    def start(self, destinations: Pieces, sources: Pieces) -> Read:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        copies = merge(destinations, sources)
        # After ``merge``: the stream is idle, so the event is recorded at once and would count the
        # time of the preparation.
        begin.record(self._stream)
        try:
            self._enqueue(*copies)
        except (TransferError, RuntimeError) as error:
            self._stream.synchronize()  # some of the copies may have started
            raise TransferError(f"GPU copies cannot start: {error}") from error
        end.record(self._stream)
        return _CudaCopy(begin, end)

    def close(self) -> None:
        self._stream.synchronize()

    def _enqueue(self, destinations: Addresses, sources: Addresses, sizes: Addresses) -> None:
        if self._has_kernel and sizes.mean() < KERNEL_BELOW_BYTES:
            from pdlaunch.transfer.connectors.copy_kernel import copy_pieces, fits_kernel

            if fits_kernel(destinations, sources, sizes):
                with torch.cuda.device(self._anchor.device), torch.cuda.stream(self._stream):
                    copy_pieces(self._anchor, destinations, sources, sizes)
                return
        self._batches.enqueue(destinations, sources, sizes, self._stream)


# Only one thread calls its methods. ``start`` begins to copy source i to destination i and never
# waits; after a TransferError, no copy is running. ``close`` waits until no copy is running.
PieceCopier = HostCopier | CudaCopier


def new_copier(device: torch.device) -> PieceCopier:
    """Return the copier for a rank's device. Raises TransferError if there is none."""
    return HostCopier() if device.type == "cpu" else CudaCopier(device)


@dataclass(eq=False)
class _CudaCopy(Read):
    begin: torch.cuda.Event
    ended: torch.cuda.Event

    def poll(self) -> ReadState:
        try:
            ended = self.ended.query()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            logger.warning("a copy from a peer's memory failed: %s", error)
            return "failed"
        return "done" if ended else "pending"

    def seconds(self) -> float:
        return float(self.begin.elapsed_time(self.ended)) / 1000
