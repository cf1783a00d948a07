"""Integers that the kernels of a step read; they are copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models.attention import IntArray, PackedBatch

# Arrays begin at multiples of 16 bytes: for other pointers Triton compiles a kernel again
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Holds a step's integers: those that kernels read are int32 on the device."""

    num_decode_rows: int  # these come first; the rest are chunks of prompts
    slots: Sequence[torch.Tensor]  # [num_tokens] by group; -1 writes nothing
    lengths: torch.Tensor  # [num_rows]; 0 for a row that has no token here
    tables: torch.Tensor  # [num_groups * num_rows * table_stride]
    table_stride_at: torch.Tensor  # [1]
    # Chunks, for the Triton kernel.
    row_starts: torch.Tensor | None = None  # [num_rows + 1]
    tile_rows: torch.Tensor | None = None  # [num_tiles]
    tile_tokens: torch.Tensor | None = None  # [num_tiles]
    # Chunks, for flash attention and cuDNN.
    chunk_lengths: list[int] = field(default_factory=list)
    # [num_chunks + 1]; first token of each chunk, counted from the first chunk's
    chunk_starts: torch.Tensor | None = None
    # Slots of the tokens before the chunks, by group; empty if all chunks begin their prompts.
    prefix_slots: Sequence[torch.Tensor] = ()  # [num_gathered_tokens]
    prefix_starts: Sequence[torch.Tensor] = ()  # [num_chunks + 1]
    longest_prefixes: Sequence[int] = ()


def upload_int32(
    arrays: Mapping[str, IntArray | list[IntArray]], device: torch.device
) -> dict[str, Any]:
    """Return flat int32 copies of ``arrays`` on ``device``, a list of them for each list.

    It is one transfer, for which the host does not wait.
    """
    lists = {name: each if isinstance(each, list) else [each] for name, each in arrays.items()}
    host = _host_buffer(
        sum(_aligned(each.size) for many in lists.values() for each in many), device
    )
    copied = torch.empty_like(host, device=device)
    content = host.numpy()
    uploaded: dict[str, Any] = {}
    start = 0
    for name, many in lists.items():
        parts = []
        for array in many:
            content[start : start + array.size] = array.reshape(-1)
            parts.append(copied[start : start + array.size])
            # Each array begins at a multiple of ALIGNMENT; what lies between is not read.
            start += _aligned(array.size)
        uploaded[name] = parts if isinstance(arrays[name], list) else parts[0]
    copied.copy_(host, non_blocking=True)
    return uploaded


def slots_of(batch: PackedBatch, block_size: int) -> list[IntArray]:
    """Return [num_tokens] by KV cache group: block * block_size + offset of each token."""
    blocks, offsets = np.divmod(batch.positions, block_size)
    return [
        table[batch.row_of_token, blocks] * block_size + offsets for table in batch.block_tables
    ]


def tiles_of(batch: PackedBatch, tile_size: int) -> tuple[IntArray, IntArray]:
    """Cut chunks into tiles of ``tile_size`` tokens: row of each tile, first token in the chunk."""
    counts = -(-np.diff(batch.row_starts)[batch.num_decode_rows :] // tile_size)
    first_tiles = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(batch.num_decode_rows, batch.num_rows), counts)
    return rows, (np.arange(len(rows)) - np.repeat(first_tiles, counts)) * tile_size


_STRIDE, _LENGTHS, _TOKEN_IDS, _POSITIONS, _SLOTS = range(5)


class GraphInputs:
    """Holds the inputs of decode steps of up to ``max_rows`` rows, where CUDA graphs read them.

    One buffer, at an address that stays, and pinned host memory for it: lines of ``max_rows``, the
    slots one line for each group, then tables. Block tables are as wide as the step's longest
    context asks for, so that only their used part is copied. Padding up to the ``num_rows`` of a
    graph reads and writes nothing: rows of length 0, tokens with slots of -1::

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
            num_decode_rows=num_rows,
            slots=[*self._lines[_SLOTS:, :num_rows]],
            lengths=self._lines[_LENGTHS, :num_rows],
            tables=self._device[self._tables_start :],
            table_stride_at=self._lines[_STRIDE, :1],
        )

    def clear(self) -> None:
        """Fill in a step that reads and writes no block."""
        self._device.zero_()
        self._lines[_SLOTS:] = -1

    def fill(self, batch: PackedBatch, num_rows: int) -> None:
        """Copy decode rows for a graph of ``num_rows``, behind the device's queued work."""
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
