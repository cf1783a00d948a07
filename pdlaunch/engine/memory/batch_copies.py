"""Enqueues many copies with one call of the driver, ``cuMemcpyBatchAsync``. The copy engines run
them and need no multiprocessors.

The driver needs about 0.5 us for each copy. Addresses may be device memory of this process, pinned
host memory, or mapped memory of a peer. Source: cuda.h of CUDA 12.8 and 13.
"""

import ctypes
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.errors import TransferError
from pdlaunch.machine.probe import DriverError, load_library

Addresses = npt.NDArray[np.uint64]

# Copies in one call. A copy engine runs them while the driver prepares the next call.
ENTRIES_A_CALL = 256

_SRC_ACCESS_ORDER_STREAM = 1  # read sources in stream order, as other copies do


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("src_access_order", ctypes.c_uint),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", ctypes.c_uint),
    ]


class BatchCopies:
    """Enqueues batches of copies, not on the default stream. Needs a driver of CUDA 12.8."""

    def __init__(self, num_streams: int, load: Callable[[], ctypes.CDLL] = load_library) -> None:
        """``num_streams``: streams that share a batch, so that several copy engines run in
        parallel; one engine runs one copy at a time. Raises DriverError.
        """
        library = load()
        # CUDA 13 removed an argument, the index of the failed copy.
        self._call = getattr(library, "cuMemcpyBatchAsync_v2", None)
        self._fail_index: tuple[Any, ...] = ()
        if self._call is None:
            self._call = getattr(library, "cuMemcpyBatchAsync", None)
            self._fail_index = (ctypes.byref(ctypes.c_size_t()),)
        if self._call is None:
            raise DriverError(
                "the CUDA driver has no cuMemcpyBatchAsync: it is older than CUDA 12.8"
            )
        self._num_streams = num_streams
        self._attributes = _Attributes(src_access_order=_SRC_ACCESS_ORDER_STREAM)
        self._attribute_starts = (ctypes.c_size_t * 1)(0)
        self._helpers: dict[torch.cuda.Stream, list[torch.cuda.Stream]] = {}

    def enqueue(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses, main: torch.cuda.Stream
    ) -> None:
        """Enqueue copies of ``sizes[i]`` bytes in the order of ``main``. Raises TransferError."""
        share = max(1, min(-(-len(sizes) // self._num_streams), ENTRIES_A_CALL))
        starts = range(0, len(sizes), share)
        if main not in self._helpers:
            new = [torch.cuda.Stream(main.device) for _ in range(self._num_streams - 1)]  # type: ignore[no-untyped-call]
            self._helpers[main] = new
        helpers = self._helpers[main][: max(0, len(starts) - 1)]
        before = main.record_event()
        for helper in helpers:
            helper.wait_event(before)
        try:
            for start, stream in zip(starts, cycle((main, *helpers)), strict=False):
                part = slice(start, start + share)
                self._enqueue(destinations[part], sources[part], sizes[part], stream)
        finally:  # even after a failure, because the first part of the batch is enqueued
            for helper in helpers:
                main.wait_stream(helper)

    def _enqueue(
        self,
        destinations: Addresses,
        sources: Addresses,
        sizes: Addresses,
        stream: torch.cuda.Stream,
    ) -> None:
        assert self._call is not None
        # The driver reads the three arrays during the call.
        code = self._call(
            *(ctypes.c_void_p(array.ctypes.data) for array in (destinations, sources, sizes)),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            self._attribute_starts,
            ctypes.c_size_t(1),
            *self._fail_index,
            ctypes.c_void_p(stream.cuda_stream),
        )
        if code:
            raise TransferError(
                f"cuMemcpyBatchAsync of {len(sizes)} copies failed with CUDA error {code}"
            )
