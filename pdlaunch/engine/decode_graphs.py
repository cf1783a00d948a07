"""Decode steps as CUDA graphs: one launch runs a whole step.

Graphs are captured at start, for some batch sizes. A batch takes the smallest graph that holds it;
the rows that remain have no context and write nothing. Graphs share their memory: the result of a
replay is good until the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from pdlaunch.engine.latest_tokens import LatestTokens
from pdlaunch.engine.sampler import likeliest_tokens
from pdlaunch.models.decoder import Decoder
from pdlaunch.models.packed import PackedBatch
from pdlaunch.models.progress import ReportProgress
from pdlaunch.models.step_inputs import DecodeInputs, Staging

if TYPE_CHECKING:
    from pdlaunch.models.triton_attention import TritonAttention

Captured = TypeVar("Captured")

SIZE_STEP = 8
"""Distance of batch sizes from 8 on: padding costs little where weights are most of the traffic."""


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: DecodeInputs
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    """[num_rows, vocab_size]"""
    likeliest: torch.Tensor
    """[num_rows]; ``likeliest_tokens``"""


class DecodeGraphs:
    """Runs batches of decode rows, one token each, from graphs.

    It captures them when it is made, the largest batch first.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: TritonAttention,
        *,
        max_rows: int,
        max_blocks: int,
        latest: LatestTokens | None,
        progress: ReportProgress,
    ) -> None:
        """Capture the graphs.

        ``max_blocks``: length of one row's block table. ``latest``: where input tokens are looked
        up; None: they are token ids.
        """
        layout, device = attention.setup.layout, attention.setup.kv_cache.device
        self._layout = layout
        self._sizes = batch_sizes(max_rows)
        staging = Staging(DecodeInputs.buffer_size(layout, self._sizes[-1], max_blocks), device)
        pool = torch.cuda.graph_pool_handle()
        self._graphs = capture_all(
            self._sizes,
            lambda size: _capture(
                decoder, attention, DecodeInputs(layout, size, staging), latest, pool
            ),
            progress,
        )

    def run(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return logits [num_rows, vocab_size] and the likeliest tokens [num_rows]; None if no
        graph fits.

        Both have to be read before the next call.
        """
        if batch.num_decode_rows < batch.num_rows or batch.num_rows > self._sizes[-1]:
            return None
        captured = self._graphs[self._sizes[bisect_left(self._sizes, batch.num_rows)]]
        captured.inputs.fill(batch)
        captured.graph.replay()
        return captured.logits[: batch.num_rows], captured.likeliest[: batch.num_rows]

    def rehearse(self) -> None:
        """Fill in a batch that is not run, so that the code for it is warm."""
        one, zero = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        tables = (np.zeros((1, 1), dtype=np.int64),) * len(self._layout.groups)
        self._graphs[self._sizes[0]].inputs.fill(
            PackedBatch(zero, zero, zero, np.arange(2), one, tables, num_decode_rows=1)
        )


def batch_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, 8, then steps of 8; the last size holds ``max_rows``."""
    sizes = [size for size in (1, 2, 4) if size < max_rows]
    return [*sizes, *range(SIZE_STEP, max_rows, SIZE_STEP), max_rows]


def capture_all(
    sizes: list[int], capture: Callable[[int], Captured], progress: ReportProgress
) -> dict[int, Captured]:
    """Capture each size, the largest first, so that smaller graphs find room in its memory."""
    captured = {}
    for index, size in enumerate(reversed(sizes)):
        progress(f"capturing CUDA graphs, batch of {size}", index / len(sizes))
        captured[size] = capture(size)
    return captured


@torch.inference_mode()
def _capture(
    decoder: Decoder,
    attention: TritonAttention,
    inputs: DecodeInputs,
    latest: LatestTokens | None,
    pool: Any,
) -> _Graph:
    # Rows of length 0 with slots of -1: warm-up and capture touch no block of the KV cache.
    inputs.buffer.zero_()
    for slots in inputs.slots:
        slots.fill_(-1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        token_ids = inputs.token_ids if latest is None else latest.look_up(inputs.token_ids)
        logits = decoder.logits(token_ids, inputs.positions, None, attention.decode_step(inputs))
        return logits, likeliest_tokens(logits)

    # The first run compiles kernels and initialises libraries, which a capture cannot.
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process go on using the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits, likeliest = step()
    return _Graph(inputs, graph, logits, likeliest)
