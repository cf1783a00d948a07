"""Steps as CUDA graphs: one launch runs a whole step.

Launched one by one, the kernels of a step take the host longer than its tokens take the device, up
to some hundred tokens. Graphs are captured at start, for some numbers of decode rows, and for some
numbers of tokens where prompts are among them. A batch takes the smallest graph that holds it; what
remains of it reads and writes nothing. Graphs share their memory: the result of a replay is good
until the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from pdlaunch.engine.device_copies import upload_array
from pdlaunch.engine.latest_tokens import LatestTokens
from pdlaunch.engine.models.decoder import Decoder
from pdlaunch.engine.models.packed import PackedBatch
from pdlaunch.engine.models.progress import ReportProgress
from pdlaunch.engine.models.step_inputs import GraphInputs, GraphShape, Staging, tiles_of
from pdlaunch.engine.sampler import likeliest_tokens

if TYPE_CHECKING:
    from pdlaunch.engine.models.triton_attention import TritonAttention

Graph = TypeVar("Graph")
Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Computes logits [num_kept, vocab_size] and ``likeliest_tokens`` [num_kept]."""

SIZE_STEP = 8
"""Distance of batch sizes from 8 on: padding costs little where weights are most of the traffic."""
FEWEST_TOKENS = 16
TOKEN_STEPS = 8
"""Sizes of graphs with prompts from each power of two to the next, from 64 on: a batch is padded by
an eighth at most.
"""
MOST_CHUNKS = 16
"""Chunks for which any graph with prompts has tiles; more fit where they are long."""


class Recorded:
    """Holds one step in a CUDA graph."""

    def __init__(self, step: Step, pool: Any) -> None:
        """``pool``: the memory that graphs share."""
        # The first run compiles kernels and initialises libraries, which a capture cannot.
        step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process go on using the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = step()

    def replay(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the step on what its inputs hold now."""
        self._graph.replay()
        return self._result


class _Results:
    """Holds logits and likeliest tokens of the latest step; all graphs write them here.

    Each would keep memory of its own for them otherwise: in bf16, 64 MiB for 256 rows of 128k
    tokens.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(
        self, logits: torch.Tensor, likeliest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy both; return where they are now."""
        if self._tensors is None:  # the first step is never captured
            shape = (self._num_rows, logits.shape[1])
            self._tensors = logits.new_empty(shape), likeliest.new_empty(self._num_rows)
        kept = self._tensors[0][: len(logits)], self._tensors[1][: len(logits)]
        kept[0].copy_(logits)
        kept[1].copy_(likeliest)
        return kept


class StepGraphs:
    """Runs steps from graphs.

    It captures them when it is made, the largest first.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: TritonAttention,
        *,
        max_rows: int,
        max_prompt_tokens: int,
        max_blocks: int,
        latest: LatestTokens | None,
        progress: ReportProgress,
    ) -> None:
        """Capture the graphs.

        ``max_prompt_tokens``: most tokens of a step with prompts; 0: none of these has a graph.
        ``max_blocks``: length of one row's block table. ``latest``: where input tokens are looked
        up; None: they are token ids.
        """
        self.max_prompt_tokens = max_prompt_tokens
        layout, device = attention.setup.layout, attention.setup.kv_cache.device
        self._layout = layout
        self._tile_size = attention.setup.chunk_tokens
        self._decode_sizes = batch_sizes(max_rows)
        self._token_sizes = token_sizes(max_prompt_tokens)
        shapes = [GraphShape(size, size) for size in self._decode_sizes]
        shapes += [self._shape(size, max_rows) for size in self._token_sizes]
        staging = Staging(
            max(GraphInputs.buffer_size(layout, shape, max_blocks) for shape in shapes), device
        )
        self._inputs = {shape: GraphInputs(layout, shape, staging) for shape in shapes}
        self._results = _Results(max(shape.num_rows for shape in shapes))
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs = capture_all(
            shapes,
            lambda shape: _capture(
                decoder, attention, self._inputs[shape], latest, self._results, pool
            ),
            progress,
        )
        self._shapes = {shape.num_tokens: shape for shape in shapes if shape.num_tiles}

    def run(self, batch: PackedBatch, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return logits [num_kept, vocab_size] and the likeliest tokens [num_kept] of the tokens
        ``kept``, each the last of a row; None if no graph fits.

        Both have to be read before the next call, which overwrites them; on the device it is enough
        that whatever reads them is queued on the stream by then.
        """
        shape = self._fitting(batch)
        if shape is None:
            return None
        self._inputs[shape].fill(batch, kept, self._tile_size)
        logits, likeliest = self._graphs[shape].replay()
        # A graph of decode rows has the logits of all. The usual case: every row draws, in the
        # order of the batch.
        if shape.num_tiles or kept == [*range(len(kept))]:
            return logits[: len(kept)], likeliest[: len(kept)]
        places = upload_array(np.array(kept, dtype=np.int64), logits.device)
        return logits[places], likeliest[places]

    def rehearse(self) -> None:
        """Fill in a batch that is not run, so that the code for it is warm."""
        one, zero = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        tables = (np.zeros((1, 1), dtype=np.int64),) * len(self._layout.groups)
        self._inputs[GraphShape(1, 1)].fill(
            PackedBatch(zero, zero, zero, np.arange(2), one, tables, num_decode_rows=1)
        )

    def _fitting(self, batch: PackedBatch) -> GraphShape | None:
        num_rows, num_tokens = batch.num_rows, len(batch.token_ids)
        if batch.num_decode_rows == num_rows:
            size = _least(self._decode_sizes, num_rows)
            return None if size is None else GraphShape(size, size)
        size = _least(self._token_sizes, num_tokens)
        if size is None:
            return None
        shape = self._shapes[size]
        num_tiles = len(tiles_of(batch, self._tile_size)[0])
        return shape if num_tiles <= shape.num_tiles else None

    def _shape(self, num_tokens: int, max_rows: int) -> GraphShape:
        # A row remains for the tiles that are not needed: a chunk has two tokens at least.
        return GraphShape(
            min(num_tokens, max_rows + 1), num_tokens, num_tokens // self._tile_size + MOST_CHUNKS
        )


def batch_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, 8, then steps of 8; the last size holds ``max_rows``."""
    sizes = [size for size in (1, 2, 4) if size < max_rows]
    return [*sizes, *range(SIZE_STEP, max_rows, SIZE_STEP), max_rows]


def token_sizes(max_tokens: int) -> list[int]:
    """Return 16, 32, 64, then ``TOKEN_STEPS`` for each power of two; the last size is
    ``max_tokens``, and there is none for 0.
    """
    sizes, size = [], FEWEST_TOKENS
    while size < max_tokens:
        sizes.append(size)
        size += size if size < 64 else (1 << (size.bit_length() - 1)) // TOKEN_STEPS
    return [*sizes, max_tokens] if max_tokens else []


def capture_all(
    shapes: list[GraphShape], capture: Callable[[GraphShape], Graph], progress: ReportProgress
) -> dict[GraphShape, Graph]:
    """Capture each shape, the largest first, so that smaller graphs find room in its memory."""
    captured = {}
    ordered = sorted(shapes, key=lambda shape: -shape.num_tokens)
    for index, shape in enumerate(ordered):
        what = "tokens with prompts" if shape.num_tiles else "decode rows"
        progress(f"capturing CUDA graphs, {what}: {shape.num_tokens}", index / len(ordered))
        captured[shape] = capture(shape)
    return captured


def _least(sizes: list[int], needed: int) -> int | None:
    index = bisect_left(sizes, needed)
    return sizes[index] if index < len(sizes) else None


@torch.inference_mode()
def _capture(
    decoder: Decoder,
    attention: TritonAttention,
    inputs: GraphInputs,
    latest: LatestTokens | None,
    results: _Results,
    pool: Any,
) -> Recorded:
    # Warm-up and capture touch no block of the KV cache.
    inputs.clear()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        token_ids = inputs.token_ids if latest is None else latest.look_up(inputs.token_ids)
        logits = decoder.logits(
            token_ids, inputs.positions, inputs.kept, attention.graph_step(inputs)
        )
        return results.keep(logits, likeliest_tokens(logits))

    return Recorded(step, pool)
