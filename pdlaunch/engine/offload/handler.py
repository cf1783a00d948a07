"""The transfer handler checks a transfer, turns it into copies and runs them, each direction on its
own.

``transfer_async`` and ``get_finished`` return at once. A block or chunk that a transfer names
belongs to it until its result is out: nobody else writes to what is read, or touches what is
written.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence

import torch

from pdlaunch.engine.offload.copies import Pages, as_pages, plan_copies, shape_of
from pdlaunch.engine.offload.copy_streams import (
    ChooseMethod,
    CopyStream,
    CudaCopyStream,
    HostCopyStream,
    Report,
    TransferResult,
)
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import DIRECTIONS, ChunkLayout, Direction, TransferSpec


def chunk_layout(groups: Sequence[Sequence[torch.Tensor]], blocks_per_chunk: int) -> ChunkLayout:
    """Return how the blocks of these groups lie in host chunks; groups as ``OffloadHandler`` takes
    them.
    """
    assert blocks_per_chunk > 0
    return ChunkLayout(
        tuple(shape_of([as_pages(tensor) for tensor in group]) for group in groups),
        blocks_per_chunk,
    )


class OffloadHandler:
    """Moves blocks between the tensors of the KV cache groups and host memory.

    ``groups``: by group its tensors, each [num_blocks, ...] contiguous; groups may share tensors.
    All on one device. ``host``: chunks laid out as ``chunk_layout(groups, blocks_per_chunk)`` says.
    ``choose``: the copy method. ``wake`` is called, from another thread, after each result. Not
    safe for more than one calling thread.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[torch.Tensor]],
        host: HostMemory,
        blocks_per_chunk: int,
        *,
        choose: ChooseMethod,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout = chunk_layout(groups, blocks_per_chunk)
        self._groups: list[list[Pages]] = [
            [as_pages(tensor) for tensor in group] for group in groups
        ]
        assert host.chunk_bytes == self._layout.chunk_bytes
        self._host = host
        self._wake = wake
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._streams = {
            direction: self._make_stream(direction, choose, self._report)
            for direction in DIRECTIONS
        }

    def transfer_async(self, job_id: int, spec: TransferSpec) -> None:
        """Queue a transfer behind those of its direction, and behind what the current CUDA stream
        holds.

        Raises TransferSpecError, and nothing is copied, when the spec does not fit the KV cache.
        Whatever fails later is told by ``get_finished``. A transfer of no blocks finishes too.
        """
        spans = self._layout.split(spec, self._host.num_chunks)
        self._streams[spec.direction].submit(
            job_id, plan_copies(spans, self._layout, self._groups, self._host)
        )

    def get_finished(self) -> list[TransferResult]:
        """Return the transfers that have ended since the last call, each once."""
        finished = []
        with contextlib.suppress(queue.Empty):
            while True:
                finished.append(self._results.get_nowait())
        return finished

    def close(self, timeout_s: float = 10.0) -> bool:
        """End both directions after what is queued. Return False when a copy still runs: host
        memory must stay then.
        """
        ended = [stream.close(timeout_s) for stream in self._streams.values()]
        return all(ended)

    def _report(self, result: TransferResult) -> None:
        self._results.put(result)
        self._wake()

    def _make_stream(
        self, direction: Direction, choose: ChooseMethod, report: Report
    ) -> CopyStream:
        def other_is_busy() -> bool:
            return any(
                stream.is_busy for other, stream in self._streams.items() if other != direction
            )

        device = self._groups[0][0].device
        if device.type == "cuda":
            return CudaCopyStream(direction, choose, report, other_is_busy, device)
        return HostCopyStream(direction, choose, report, other_is_busy)
