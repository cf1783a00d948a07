"""Runs decode steps as CUDA graphs: one launch runs a whole step.

Launching the kernels of a decode step one by one takes the host longer than the device needs to run
them. Graphs are captured at start, for some numbers of rows. A batch uses the smallest graph that
holds it; the remaining rows read and write nothing. Graphs share their memory: the result of a
replay is valid until the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pdlaunch.engine.models.attention import Decoder, PackedBatch, ReportProgress
from pdlaunch.engine.models.step_inputs import GraphInputs, upload_array
from pdlaunch.engine.rows import LatestTokens
from pdlaunch.engine.sampler import likeliest_tokens

if TYPE_CHECKING:
    from pdlaunch.engine.models.triton_attention import TritonAttention

# Computes logits [num_rows, vocab_size] and ``likeliest_tokens`` [num_rows]
Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]

# Distance of batch sizes from 8 on: padding costs little where weights are most of the traffic
SIZE_STEP = 8


def record(step: Step, pool: Any) -> Step:
    """Return the replay of a step that is captured in a CUDA graph; graphs share ``pool``."""
    # The first run compiles kernels and initialises libraries, which a capture cannot do.
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local, because other threads of the process use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        graph.replay()
        return result

    return replay


@dataclass(eq=False)
class StepGraphs:
    """Captures graphs of decode steps, the largest first: the others reuse its memory."""

    decoder: Decoder
    attention: TritonAttention
    max_rows: int
    max_blocks: int  # of one row
    latest: LatestTokens | None  # where input tokens are looked up, if at all
    progress: ReportProgress

    def __post_init__(self) -> None:
        self._sizes = batch_sizes(self.max_rows)
        # Logits and likeliest tokens of the latest step; all graphs write them here. Otherwise each
        # graph would keep memory of its own: 64 MiB for 256 rows of 128k tokens in bf16.
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        attention = self.attention
        device = attention.kv_cache.device
        self._inputs = GraphInputs(attention.layout, self.max_rows, self.max_blocks, device)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs: dict[int, Step] = {}
        for index, size in enumerate(reversed(self._sizes)):
            self.progress(f"capturing CUDA graphs: {size} rows", index / len(self._sizes))
            self._graphs[size] = self._capture(size, pool)

    def run(self, batch: PackedBatch, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return logits [num_kept, vocab_size] and the likeliest tokens [num_kept] of the rows
        ``kept``; None if no graph fits. The next call overwrites both: kernels that read them must
        be queued before.
        """
        index = bisect_left(self._sizes, batch.num_rows)
        if batch.num_decode_rows < batch.num_rows or index == len(self._sizes):
            return None
        size = self._sizes[index]
        self._inputs.fill(batch, size)
        logits, likeliest = self._graphs[size]()
        # The usual case: every row draws, in the order of the batch.
        if kept == [*range(len(kept))]:
            return logits[: len(kept)], likeliest[: len(kept)]
        places = upload_array(np.array(kept, dtype=np.int64), logits.device)
        return logits[places], likeliest[places]

    @torch.inference_mode()
    def _capture(self, num_rows: int, pool: Any) -> Step:
        # With cleared inputs, warm-up and capture touch no block of the KV cache.
        self._inputs.clear()

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            token_ids = self._inputs.token_ids(num_rows)
            if self.latest is not None:
                token_ids = self.latest.look_up(token_ids)
            attention = self.attention.graph_step(self._inputs.tensors(num_rows))
            positions = self._inputs.positions(num_rows)
            logits = self.decoder.logits(token_ids, positions, None, attention)
            return self._keep(logits, likeliest_tokens(logits))

        return record(step, pool)

    def _keep(
        self, logits: torch.Tensor, likeliest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kept is None:  # True only in the very first run, which is not captured
            most = self._sizes[-1]
            self._kept = logits.new_empty(most, logits.shape[1]), likeliest.new_empty(most)
        kept = self._kept[0][: len(logits)], self._kept[1][: len(logits)]
        kept[0].copy_(logits)
        kept[1].copy_(likeliest)
        return kept


def batch_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, 8, then steps of 8; the last size holds ``max_rows``."""
    sizes = [size for size in (1, 2, 4) if size < max_rows]
    return [*sizes, *range(SIZE_STEP, max_rows, SIZE_STEP), max_rows]
