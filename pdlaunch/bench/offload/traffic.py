"""Runs at once what ``pdlaunch bench offload`` compares: a step like one of decode, and transfers
in both directions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from pdlaunch.engine.offload.copies import Pages
from pdlaunch.engine.offload.handler import OffloadHandler
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.measure import JOB_BYTES
from pdlaunch.engine.offload.method_choice import MethodTable
from pdlaunch.engine.offload.spec import DIRECTIONS, Direction, IntArray, TransferSpec
from pdlaunch.errors import TransferError


class DecodeLikeStep:
    """Does to a GPU what a decode step does: reads many weight matrices once, for few tokens, in
    one CUDA graph.
    """

    def __init__(self, device: torch.device, *, num_layers: int = 24, num_tokens: int = 32) -> None:
        weights = [
            torch.randn(4096, 14336, dtype=torch.bfloat16, device=device) for _ in range(num_layers)
        ]
        inputs = torch.randn(num_tokens, 4096, dtype=torch.bfloat16, device=device)
        torch.mm(inputs, weights[0])
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [torch.mm(inputs, weight) for weight in weights]
        self._weights = weights
        self._graph.replay()

    def seconds(self, num_steps: int = 20, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Return the median time of a step, one after another on the current stream.

        ``meanwhile`` is called when they have begun.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        meanwhile()
        events[-1].synchronize()
        times = sorted(float(begin.elapsed_time(end)) / 1000 for begin, end in pairwise(events))
        return times[num_steps // 2]


class Traffic:
    """Sends transfers through the handler: one half of ``pages`` is stored, the other loaded, in
    random order.

    On the host they are chunks of ``blocks_per_chunk`` pages, in random order too, of all of
    ``host``.
    """

    def __init__(
        self, pages: Pages, host: HostMemory, table: MethodTable, *, blocks_per_chunk: int
    ) -> None:
        self._finished = threading.Semaphore(0)
        self._handler = OffloadHandler(
            [[pages]], host, blocks_per_chunk, choose=table.choose, wake=self._finished.release
        )
        half = len(pages) // 2
        num_chunks = half // blocks_per_chunk
        num_jobs = min(max(1, half * pages.shape[1] // JOB_BYTES), num_chunks)
        random = np.random.default_rng(0)
        chunks = random.permutation(host.num_chunks)
        self._jobs: dict[Direction, list[tuple[IntArray, IntArray]]] = {}
        for index, direction in enumerate(DIRECTIONS):
            blocks = index * half + random.permutation(half).reshape(num_chunks, blocks_per_chunk)
            own_chunks = chunks[index * num_chunks : (index + 1) * num_chunks]
            self._jobs[direction] = list(
                zip(
                    np.array_split(blocks, num_jobs),
                    np.array_split(own_chunks, num_jobs),
                    strict=True,
                )
            )
        self._num_submitted = 0
        self._num_pending = dict.fromkeys(DIRECTIONS, 0)

    def run(self, directions: Sequence[Direction]) -> float:
        """Return the seconds of one round."""
        began_at = time.perf_counter()
        self.submit(directions)
        self.wait()
        return time.perf_counter() - began_at

    def submit(self, directions: Sequence[Direction]) -> None:
        """Queue one round of these directions."""
        for jobs in zip(*(self._jobs[direction] for direction in directions), strict=True):
            for direction, (blocks, chunk_ids) in zip(directions, jobs, strict=True):
                self._submit(direction, blocks.ravel(), chunk_ids)

    def wait(self) -> None:
        """Wait until nothing is under way."""
        while any(self._num_pending.values()):
            self._finished.acquire()
            self._collect()

    def is_busy(self, directions: Sequence[Direction]) -> bool:
        """Return True while all of these are under way."""
        self._collect()
        return all(self._num_pending[direction] for direction in directions)

    def close(self) -> None:
        """End the handler."""
        self._handler.close(60.0)

    def _submit(self, direction: Direction, block_ids: IntArray, chunk_ids: IntArray) -> None:
        spec = TransferSpec(direction, block_ids, [len(block_ids)], [0], chunk_ids)
        self._handler.transfer_async(self._num_submitted, spec)
        self._num_submitted += 1
        self._num_pending[direction] += 1

    def _collect(self) -> None:
        for result in self._handler.get_finished():
            if not result.ok:
                raise TransferError(result.error)
            self._num_pending[result.direction] -= 1
