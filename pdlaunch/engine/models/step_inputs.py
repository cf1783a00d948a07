"""Integers that the kernels of a step read; they are copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models.attention import IntArray, PackedBatch

ALIGNMENT = 4
"""Arrays begin at multiples of 16 bytes: Triton compiles a kernel again for a pointer that does
not.
"""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Says which keys and values of one group a gather puts together for flash attention."""

    slots: torch.Tensor  # [num_gathered_tokens] int32
    starts: torch.Tensor  # [num_chunks + 1] int32
    longest: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """Describes the rows after the decode rows: chunks of prompts."""

    # For the Triton kernel.
    row_starts: torch.Tensor  # [num_rows + 1] int32
    tile_rows: torch.Tensor  # [num_tiles] int32
    tile_tokens: torch.Tensor  # [num_tiles] int32
    # For flash attention and cuDNN.
    starts: torch.Tensor
    """[num_chunks + 1] int32; first token of each chunk, counted from the first chunk's"""
    lengths: tuple[int, ...]  # tokens of each chunk
    prefixes: tuple[Prefix, ...]  # one for each group; empty: no chunk has anything before it

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Holds a step's integers on the device."""

    slots: tuple[torch.Tensor, ...]  # [num_tokens] int32 by group; -1 writes nothing
    lengths: torch.Tensor  # [num_rows] int32; 0 for a row that has no token here
    num_decode_rows: int  # these come first; the rest are chunks
    tables: torch.Tensor  # [num_groups * num_rows * table_stride] int32
    table_stride_at: torch.Tensor  # [1] int32
    chunks: Chunks | None = None


def upload_int32(arrays: Mapping[str, IntArray], device: torch.device) -> dict[str, torch.Tensor]:
    """Return flat int32 copies of ``arrays`` on ``device``.

    It is one transfer, for which the host does not wait.
    """
    ends = np.cumsum([_aligned(array.size) for array in arrays.values()])
    host = _host_buffer(int(ends[-1]), device)
    content = host.numpy()
    places = {}
    for (name, array), end in zip(arrays.items(), ends.tolist(), strict=True):
        # Each array begins at a multiple of ALIGNMENT; what lies between is not read.
        start = end - _aligned(array.size)
        places[name] = slice(start, start + array.size)
        content[places[name]] = array.reshape(-1)
    copied = host.to(device, non_blocking=True)
    return {name: copied[place] for name, place in places.items()}


def slots_of(batch: PackedBatch, block_size: int) -> list[IntArray]:
    """Return [num_tokens] by KV cache group: block * block_size + offset of each token."""
    blocks, offsets = np.divmod(batch.positions, block_size)
    return [
        table[batch.row_of_token, blocks] * block_size + offsets for table in batch.block_tables
    ]


def tiles_of(batch: PackedBatch, tile_size: int) -> tuple[IntArray, IntArray]:
    """Cut chunks into tiles of ``tile_size`` tokens: the row of each tile, and its first token,
    counted in the chunk.
    """
    counts = -(-np.diff(batch.row_starts)[batch.num_decode_rows :] // tile_size)
    first_tiles = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(batch.num_decode_rows, batch.num_rows), counts)
    return rows, (np.arange(len(rows)) - np.repeat(first_tiles, counts)) * tile_size


_STRIDE, _LENGTHS, _TOKEN_IDS, _POSITIONS, _SLOTS = range(5)


class GraphInputs:
    """Holds the inputs of decode steps of up to ``max_rows`` rows, where CUDA graphs read them.

    One buffer, at an address that stays, and pinned host memory for it: lines of ``max_rows``, the
    slots one line for each group, then tables. Block tables are as wide as the step's longest
    context asks for, so that only their used part is copied. What pads a batch to the ``num_rows``
    of a graph reads nothing and writes nothing: rows of length 0, tokens with slots of -1::

        stride 3 │ lengths 9 8 7 0 0 │ token_ids .. │ positions .. │ slots 5 6 7 -1 -1 │ tables ..
    """

    def __init__(
        self, layout: KVCacheLayout, max_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        """``max_blocks``: of one row."""
        self._block_size = layout.block_size
        self._num_groups = len(layout.groups)
        num_lines = _SLOTS + self._num_groups
        self._tables_start = num_lines * _aligned(max_rows)
        size = self._tables_start + self._num_groups * max_rows * max_blocks
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._lines = self._device[: self._tables_start].view(num_lines, -1)
        self._host = _host_buffer(size, device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def token_ids(self, num_rows: int) -> torch.Tensor:
        return self._lines[_TOKEN_IDS, :num_rows]

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._lines[_POSITIONS, :num_rows]

    def tensors(self, num_rows: int) -> StepTensors:
        """Return what attention reads in a step of ``num_rows`` rows."""
        return StepTensors(
            slots=tuple(self._lines[_SLOTS:, :num_rows]),
            lengths=self._lines[_LENGTHS, :num_rows],
            num_decode_rows=num_rows,
            tables=self._device[self._tables_start :],
            table_stride_at=self._lines[_STRIDE, :1],
        )

    def clear(self) -> None:
        """Fill in a step that reads and writes no block."""
        self._device.zero_()
        self._lines[_SLOTS:] = -1

    def fill(self, batch: PackedBatch, num_rows: int) -> None:
        """Copy the decode rows of a batch for a graph of ``num_rows``, behind the device's queued
        work.
        """
        if self._sent is not None:
            # The last copy from the host's buffer has to end before it is overwritten.
            self._sent.synchronize()
        content: npt.NDArray[np.int32] = self._host.numpy()
        lines = content[: self._tables_start].reshape(len(self._lines), -1)
        stride, used = batch.block_tables[0].shape[1], slice(batch.num_rows)
        lines[:_SLOTS], lines[_SLOTS:] = 0, -1
        lines[_STRIDE, 0] = stride
        lines[_LENGTHS, used] = batch.context_lengths
        lines[_TOKEN_IDS, used] = batch.token_ids
        lines[_POSITIONS, used] = batch.positions
        lines[_SLOTS:, used] = slots_of(batch, self._block_size)
        end = self._tables_start + self._num_groups * num_rows * stride
        tables = content[self._tables_start : end].reshape(self._num_groups, num_rows, stride)
        tables[:, used] = batch.block_tables
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Allocate a buffer, pinned where there is a device.

    torch keeps pinned memory until the copies that were queued from it are done, then gives it out
    again.
    """
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
