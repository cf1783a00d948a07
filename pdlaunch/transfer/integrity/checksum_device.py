"""Computes checksums on a CUDA device, on a stream of its own; events tell when they are there.

The kernel reads block ids from page-locked host memory and writes checksums there, so that nothing
is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.transfer.integrity.checksum_kernel import constants, hash_regions


class DeviceChecksums:
    """Holds the checksums of one launch of the kernel."""

    def __init__(
        self, block_ids: torch.Tensor, results: torch.Tensor, ended: torch.cuda.Event
    ) -> None:
        """``block_ids``: [num_blocks] int64; ``results``: [num_blocks, num_heads] int64, final
        after ``ended``. Both are page-locked, and kept because the kernel uses them.
        """
        self._block_ids = block_ids
        self._results = results
        self._ended = ended

    def ready(self) -> bool:
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def result(self) -> npt.NDArray[np.uint64]:
        self._ended.synchronize()
        return self._results.numpy().view(np.uint64)


class PreparedChecksums:
    """Holds a batch that needs nothing but the launch; a ``HashBatch``."""

    def __init__(
        self, hasher: DeviceHasher, ids: torch.Tensor, first_head: int, results: torch.Tensor
    ) -> None:
        """``ids``: [num_blocks] int64, ``results``: [num_blocks, num_heads] int64; page-locked."""
        self._hasher = hasher
        self._ids = ids
        self._first_head = first_head
        self._results = results

    def start(self, blocks: slice, after: torch.cuda.Event | None = None) -> DeviceChecksums:
        """Launch the kernel for ``blocks``, a slice of the batch; wait for nothing."""
        return self._hasher.launch(
            self._ids[blocks], self._first_head, self._results[blocks], after
        )


class DeviceHasher:
    """Launches the kernel over one KV cache, from one thread."""

    def __init__(self, memory: torch.Tensor) -> None:
        """Compile the kernel. ``memory``: [num_blocks, num_kv_heads, head_bytes] uint8, which it
        ``supports``.
        """
        self._words = memory.view(torch.int64)
        self._device = memory.device
        self._constants = constants(memory.device)
        self._stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]
        self._launched: list[DeviceChecksums] = []
        """Kept until they end: a kernel uses its memory whether or not anybody wants the result."""
        self.prepare([0], slice(0, 1)).start(slice(0, 1)).result()

    def prepare(self, block_ids: Sequence[int], heads: slice) -> PreparedChecksums:
        """Prepare checksums by block and head, to be launched part by part."""
        first_head, end_head, _ = heads.indices(self._words.shape[1])
        ids = torch.empty(len(block_ids), dtype=torch.int64, pin_memory=True)
        ids.numpy()[:] = block_ids
        results = torch.empty((len(ids), end_head - first_head), dtype=torch.int64, pin_memory=True)
        return PreparedChecksums(self, ids, first_head, results)

    def launch(
        self,
        ids: torch.Tensor,
        first_head: int,
        results: torch.Tensor,
        after: torch.cuda.Event | None,
    ) -> DeviceChecksums:
        """Launch the kernel. The blocks are complete already, or by the event ``after``.

        ``ids`` and ``results`` are as in ``hash_regions``, and page-locked.
        """
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            if after is not None:
                self._stream.wait_event(after)
            hash_regions(self._words, ids, first_head, results, self._constants)
            ended.record(self._stream)
        self._launched = [launched for launched in self._launched if not launched.ready()]
        launched = DeviceChecksums(ids, results, ended)
        self._launched.append(launched)
        return launched
