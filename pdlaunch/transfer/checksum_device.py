"""Checksums computed on a CUDA device: launched on a stream of their own, waited for by asking.

The kernel reads block ids from page-locked host memory and writes checksums there: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.transfer.checksum_kernel import constants, hash_regions


class DeviceChecksums:
    """One launch."""

    def __init__(self, block_ids: torch.Tensor, results: torch.Tensor, ended: torch.cuda.Event) -> None:
        """``block_ids``: [num_blocks] int64; ``results``: [num_blocks, num_heads] int64; page-locked, good after ``ended``."""
        self._block_ids = block_ids
        self._results = results
        self._ended = ended

    def ready(self) -> bool:
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def result(self) -> npt.NDArray[np.uint64]:
        self._ended.synchronize()
        return self._results.numpy().view(np.uint64)


class DeviceHasher:
    """Launches kernels over one KV cache, from one thread."""

    def __init__(self, memory: torch.Tensor) -> None:
        """``memory``: [num_blocks, num_kv_heads, head_bytes] uint8 that the kernel ``supports``. Compiles it."""
        self._words = memory.view(torch.int64)
        self._device = memory.device
        self._constants = constants(memory.device)
        self._stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]
        self._launched: list[DeviceChecksums] = []
        """The kernels read and write their memory, whoever still wants the result."""
        self.start([0], slice(0, 1)).result()

    def start(self, block_ids: Sequence[int], heads: slice, after: torch.cuda.Event | None = None) -> DeviceChecksums:
        """Checksums by block and head; the blocks are complete already, or by the event ``after``."""
        first_head, end_head, _ = heads.indices(self._words.shape[1])
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            ids = torch.empty(len(block_ids), dtype=torch.int64, pin_memory=True)
            ids.numpy()[:] = block_ids
            results = torch.empty((len(ids), end_head - first_head), dtype=torch.int64, pin_memory=True)
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            if after is not None:
                self._stream.wait_event(after)
            hash_regions(self._words, ids, first_head, results, self._constants)
            ended.record(self._stream)
        self._launched = [launched for launched in self._launched if not launched.ready()]
        launched = DeviceChecksums(ids, results, ended)
        self._launched.append(launched)
        return launched
