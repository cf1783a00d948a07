"""Integers that the kernels of a step read; they are copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.models.packed import IntArray, PackedBatch

Int32Array = npt.NDArray[np.int32]

ALIGNMENT = 4
"""Arrays begin at multiples of 16 bytes: Triton compiles a kernel again for a pointer that does
not.
"""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Says which keys and values of one group a gather puts together for flash attention."""

    slots: torch.Tensor
    """[num_gathered_tokens] int32"""
    starts: torch.Tensor
    """[num_chunks + 1] int32"""
    longest: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """Describes the rows after the decode rows: chunks of prompts."""

    longest: int
    starts: torch.Tensor
    """[num_chunks + 1] int32; first token of each chunk, counted from the first chunk's"""
    row_starts: torch.Tensor
    """[num_rows + 1] int32"""
    tile_rows: torch.Tensor
    """[num_tiles] int32"""
    tile_tokens: torch.Tensor
    """[num_tiles] int32"""
    prefixes: tuple[Prefix, ...] | None
    """One for each group; None: no chunk has anything before it."""
    lengths: tuple[int, ...]
    """Tokens of each chunk, if cuDNN can do them: long ones without anything before them. Else
    empty.
    """


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Holds a step's integers on the device."""

    slots: tuple[torch.Tensor, ...]
    """[num_tokens] int32 by group; -1 writes nothing"""
    lengths: torch.Tensor
    """[num_rows] int32"""
    tables: torch.Tensor
    """[num_groups * num_rows * table_stride] int32"""
    table_stride_at: torch.Tensor
    """[1] int32"""
    num_decode_rows: int
    chunks: Chunks | None


def upload_int32(
    arrays: Sequence[IntArray | Int32Array], device: torch.device
) -> list[torch.Tensor]:
    """Return flat int32 copies of ``arrays`` on ``device``.

    It is one transfer, for which the host does not wait.
    """
    starts = np.concatenate([[0], np.cumsum([_aligned(array.size) for array in arrays])])
    host = _host_buffer(int(starts[-1]), device)
    content = host.numpy()
    for start, array in zip(starts[:-1], arrays, strict=True):
        # Each array begins at a multiple of ALIGNMENT; what lies between is not read.
        content[start : start + array.size] = array.reshape(-1)
    copied = host.to(device, non_blocking=True)
    return [
        copied[start : start + array.size] for start, array in zip(starts[:-1], arrays, strict=True)
    ]


def slots_of(tables: tuple[IntArray, ...], batch: PackedBatch, block_size: int) -> list[IntArray]:
    """Return [num_tokens] by KV cache group: block * block_size + offset of each token."""
    blocks, offsets = np.divmod(batch.positions, block_size)
    return [table[batch.row_of_token, blocks] * block_size + offsets for table in tables]


class Staging:
    """Holds integers on the device at an address that stays, and pinned host memory for them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = _host_buffer(size, device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def host(self) -> Int32Array:
        """Return the array to be written to; waits until the last copy from it is done."""
        if self._sent is not None:
            self._sent.synchronize()
        content: Int32Array = self._host.numpy()
        return content

    def send(self, size: int) -> None:
        """Copy the first ``size`` integers, behind the work that is queued on the device."""
        self.device[:size].copy_(self._host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Holds the inputs of decode steps of up to ``num_rows`` rows, where CUDA graphs read them.

    One buffer, at an address that stays: ``| stride | lengths | token_ids | positions | slots of
    each group | tables of each group |``. Block tables are as wide as the step's longest context
    asks for, so that only their used part is copied.
    """

    layout: KVCacheLayout
    num_rows: int
    staging: Staging
    """Shared by inputs of several sizes, of which one is in use at a time."""

    @property
    def buffer(self) -> torch.Tensor:
        return self.staging.device

    @staticmethod
    def buffer_size(layout: KVCacheLayout, num_rows: int, max_blocks: int) -> int:
        """Return how many integers ``num_rows`` rows with block tables of ``max_blocks`` need."""
        num_groups = len(layout.groups)
        return (
            ALIGNMENT + (3 + num_groups) * _aligned(num_rows) + num_groups * num_rows * max_blocks
        )

    @property
    def table_stride_at(self) -> torch.Tensor:
        """Return [1]: the blocks in a row of ``tables``."""
        return self.buffer[:1]

    @property
    def lengths(self) -> torch.Tensor:
        """Return [num_rows]; 0 for rows that pad the batch."""
        return self._line(0)

    @property
    def token_ids(self) -> torch.Tensor:
        """Return [num_rows]."""
        return self._line(1)

    @property
    def positions(self) -> torch.Tensor:
        """Return [num_rows]."""
        return self._line(2)

    @property
    def slots(self) -> tuple[torch.Tensor, ...]:
        """Return by group [num_rows]; -1 for rows that pad the batch."""
        return tuple(self._line(3 + group) for group in range(len(self.layout.groups)))

    @property
    def tables(self) -> torch.Tensor:
        """Return [num_groups * num_rows * table_stride]."""
        return self.buffer[self._tables_start :]

    def fill(self, batch: PackedBatch) -> None:
        """Copy a batch of at most ``num_rows`` decode rows, behind the device's queued work."""
        stride = max(table.shape[1] for table in batch.block_tables)
        used = self._tables_start + len(batch.block_tables) * self.num_rows * stride
        content = self.staging.host()
        # | stride | lengths | token_ids | positions | slots ..   | tables ..        |
        # 0        ALIGNMENT, then a line of num_rows for each    └ _tables_start    └ used
        # Rows past the batch get length 0 and slots of -1, so that they read and write nothing.
        content[: self._tables_start] = 0
        content[0] = stride
        slots = slots_of(batch.block_tables, batch, self.layout.block_size)
        for index, line in enumerate(
            (batch.context_lengths, batch.token_ids, batch.positions, *slots)
        ):
            start = ALIGNMENT + index * _aligned(self.num_rows)
            content[start : start + len(line)] = line
            content[start + len(line) : start + self.num_rows] = -1 if index >= 3 else 0
        tables = content[self._tables_start : used].reshape(
            len(batch.block_tables), self.num_rows, stride
        )
        for target, table in zip(tables, batch.block_tables, strict=True):
            target[: batch.num_rows] = table
        self.staging.send(used)

    @property
    def _tables_start(self) -> int:
        return ALIGNMENT + (3 + len(self.layout.groups)) * _aligned(self.num_rows)

    def _line(self, index: int) -> torch.Tensor:
        start = ALIGNMENT + index * _aligned(self.num_rows)
        return self.buffer[start : start + self.num_rows]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Allocate a buffer, pinned where there is a device.

    torch keeps pinned memory until the copies that were queued from it are done, then gives it out
    again.
    """
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
