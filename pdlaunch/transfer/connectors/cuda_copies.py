"""Copies from a peer's mapped memory on a GPU, with the copy engines or with a kernel. Import this
module only beside a GPU.

The copy engines leave all multiprocessors to the model, and are as fast as the link for large
pieces (H200, NVLink: 394 GB/s at 8 MiB, 338 at 1 MiB, 104 at 64 KiB, 34 at 16 KiB); for small ones
a kernel is. Which one is used is measured at the handshake. Copies are enqueued in parts: the first
moves while the others are prepared, and what has landed can be used while the rest moves.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.errors import TransferError
from pdlaunch.machine.cuda_driver import DriverError
from pdlaunch.transfer.connectors.connector import Read, ReadPart, ReadState
from pdlaunch.transfer.connectors.piece_copies import PieceCopier, Pieces

logger = logging.getLogger(__name__)

BATCH_STREAMS = (1, 3)
KERNELS = ((32, 8192, 8),)
"""Shapes of the copy kernel (programs, words of a tile, warps) with 1 MiB in flight, which is about
what NVLink holds at 400 GB/s.
"""


class _CudaCopier(PieceCopier):
    """Enqueues copies on a stream; an event marks the end of each part."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def start(self, pieces: Pieces) -> Read:
        parts = pieces.parts
        begin, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            try:
                for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
                    enqueue = self._prepare(part)
                    # Behind the first part's preparation: the stream is idle, so that its time
                    # would begin before there is anything to copy.
                    if index == 0:
                        begin.record(self._stream)
                    enqueue()
                    end.record(self._stream)
            except (TransferError, RuntimeError) as error:
                self._stream.synchronize()  # a part of it may be on its way
                raise TransferError(f"copies by {self.name} were refused: {error}") from error
        return CudaCopy(begin, ends, [len(part.sources) for part in parts])

    def close(self) -> None:
        self._stream.synchronize()

    @abstractmethod
    def _prepare(self, pieces: Pieces) -> Callable[[], object]:
        """Return a function that enqueues the copies on the current stream."""


class BatchCopier(_CudaCopier):
    """Copies with the copy engines."""

    def __init__(self, stream: torch.cuda.Stream, num_streams: int) -> None:
        """Raise DriverError where the driver is too old."""
        super().__init__(stream)
        self.name = f"batch{num_streams}"
        self._batches = BatchCopies(num_streams)

    def _prepare(self, pieces: Pieces) -> Callable[[], object]:
        return partial(self._batches.enqueue, *pieces.merged, self._stream)


class KernelCopier(_CudaCopier):
    """Copies with programs of a kernel; each takes at most one multiprocessor meanwhile."""

    def __init__(
        self, stream: torch.cuda.Stream, anchor: torch.Tensor, shape: tuple[int, int, int]
    ) -> None:
        """``anchor`` is device memory that the kernel's addresses are relative to."""
        super().__init__(stream)
        self.name = f"kernel{shape[0]}"
        self._anchor = anchor.view(-1).view(torch.uint8)
        self._shape = shape

    def supports(self, pieces: Pieces) -> bool:
        from pdlaunch.engine.memory.page_kernel import UNIT_BYTES

        addresses = np.concatenate((pieces.sources, pieces.destinations))
        return not (
            pieces.piece_bytes % UNIT_BYTES
            or (addresses % UNIT_BYTES).any()
            or self._anchor.data_ptr() % UNIT_BYTES
        )

    def _prepare(self, pieces: Pieces) -> Callable[[], object]:
        from pdlaunch.engine.memory.page_kernel import copy_pages

        words = self._anchor[: self._anchor.numel() // 4 * 4].view(torch.int32)
        units = relative_units(pieces, words.data_ptr(), pin=words.is_cuda)
        on_device = units.to(words.device, non_blocking=True)
        return partial(
            copy_pages,
            words,
            words,
            on_device,
            len(pieces.sources),
            pieces.piece_bytes,
            self._shape,
        )


class CudaCopy(Read):
    def __init__(
        self, begin: torch.cuda.Event, ends: Sequence[torch.cuda.Event], num_pieces: Sequence[int]
    ) -> None:
        """``ends`` are the events of the parts, of ``num_pieces`` each, in the order of the
        copies.
        """
        self._begin, self._end = begin, ends[-1]
        self._parts = list(zip(accumulate(num_pieces), ends, strict=True))

    def poll(self) -> ReadState:
        try:
            ended = self._end.query()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            logger.warning("a copy from a peer's memory failed: %s", error)
            return "failed"
        return "done" if ended else "pending"

    def parts(self) -> Sequence[ReadPart]:
        return self._parts

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._end)) / 1000


def relative_units(pieces: Pieces, anchor: int, *, pin: bool) -> torch.Tensor:
    """Return sources and destinations in units of 16 bytes from ``anchor``, before it or behind it:
    [2, num_columns] int64.
    """
    from pdlaunch.engine.memory.page_kernel import UNIT_BYTES, padded_columns

    num_pieces = len(pieces.sources)
    units = torch.zeros((2, padded_columns(num_pieces)), dtype=torch.int64, pin_memory=pin)
    for row, addresses in zip(units.numpy(), (pieces.sources, pieces.destinations), strict=True):
        np.floor_divide(addresses.astype(np.int64) - anchor, UNIT_BYTES, out=row[:num_pieces])
    return units


def new_cuda_copiers(anchor: torch.Tensor) -> list[PieceCopier]:
    """Return the copiers that this machine offers; the first one takes the fewest multiprocessors.
    Raises TransferError when there is none.
    """
    stream = torch.cuda.Stream(anchor.device, priority=-1)  # type: ignore[no-untyped-call]
    found: list[PieceCopier] = []
    try:
        found += [BatchCopier(stream, num_streams) for num_streams in BATCH_STREAMS]
    except DriverError as error:
        logger.info("no batch copies: %s", error)
    if importlib.util.find_spec("triton") is not None:
        found += [KernelCopier(stream, anchor, shape) for shape in KERNELS]
    if not found:
        raise TransferError(
            "neither a CUDA driver of 12.8 or newer nor Triton is there to copy with"
        )
    return found
