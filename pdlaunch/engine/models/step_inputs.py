"""Integers that the kernels of a step read; they are copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models.attention import IntArray, PackedBatch

Int32Array = npt.NDArray[np.int32]

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
class LibraryChunks:
    """Describes chunks of prompts to flash attention and cuDNN."""

    longest: int
    starts: torch.Tensor
    """[num_chunks + 1] int32; first token of each chunk, counted from the first chunk's"""
    prefixes: tuple[Prefix, ...] | None  # one for each group; None: no chunk has anything before it
    lengths: tuple[int, ...]
    """Tokens of each chunk, if cuDNN can do them: long ones without anything before them. Else
    empty.
    """


@dataclass(frozen=True, slots=True)
class Chunks:
    """Describes the rows after the decode rows: chunks of prompts."""

    row_starts: torch.Tensor  # [num_rows + 1] int32
    tile_rows: torch.Tensor  # [num_tiles] int32
    tile_tokens: torch.Tensor  # [num_tiles] int32
    library: LibraryChunks | None  # none: they go through the Triton kernel


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Holds a step's integers on the device."""

    slots: tuple[torch.Tensor, ...]  # [num_tokens] int32 by group; -1 writes nothing
    lengths: torch.Tensor  # [num_rows] int32; 0 for a row that has no token here
    num_decode_rows: int  # these come first; the rest are chunks
    tables: torch.Tensor  # [num_groups * num_rows * table_stride] int32
    table_stride_at: torch.Tensor  # [1] int32
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


def tiles_of(batch: PackedBatch, tile_size: int) -> tuple[IntArray, IntArray]:
    """Cut chunks into tiles of ``tile_size`` tokens: the row of each tile, and its first token,
    counted in the chunk.
    """
    counts = -(-np.diff(batch.row_starts)[batch.num_decode_rows :] // tile_size)
    first_tiles = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(batch.num_decode_rows, batch.num_rows), counts)
    return rows, (np.arange(len(rows)) - np.repeat(first_tiles, counts)) * tile_size


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


class GraphInputs:
    """Holds the inputs of decode steps of up to ``num_rows`` rows, where a CUDA graph reads them.

    One buffer, at an address that stays: ``| stride | lengths | token_ids | positions | slots of
    each group | tables of each group |``. Block tables are as wide as the step's longest context
    asks for, so that only their used part is copied. What pads a batch reads nothing and writes
    nothing: rows of length 0, tokens with slots of -1.
    """

    def __init__(self, layout: KVCacheLayout, num_rows: int, staging: Staging) -> None:
        """``staging``: may be shared by inputs of several sizes, of which one is in use at a
        time.
        """
        self.layout = layout
        self.num_rows = num_rows
        self.staging = staging
        names = ("lengths", "token_ids", "positions")
        slots = tuple(f"slots {index}" for index in range(len(layout.groups)))
        size = _aligned(num_rows)
        starts = {name: ALIGNMENT + index * size for index, name in enumerate(names + slots)}
        self._places = {name: slice(start, start + num_rows) for name, start in starts.items()}
        self._places["stride"] = slice(0, 1)
        self._tables_start = ALIGNMENT + len(starts) * size

    @staticmethod
    def buffer_size(layout: KVCacheLayout, num_rows: int, max_blocks: int) -> int:
        """Return how many integers it takes, with block tables of ``max_blocks`` a row."""
        num_groups = len(layout.groups)
        return (
            ALIGNMENT + (3 + num_groups) * _aligned(num_rows) + num_groups * num_rows * max_blocks
        )

    @property
    def token_ids(self) -> torch.Tensor:
        """Return [num_rows]."""
        return self._line("token_ids")

    @property
    def positions(self) -> torch.Tensor:
        """Return [num_rows]."""
        return self._line("positions")

    @property
    def tensors(self) -> StepTensors:
        """Return what attention reads."""
        return StepTensors(
            slots=tuple(self._line(f"slots {index}") for index in range(len(self.layout.groups))),
            lengths=self._line("lengths"),
            num_decode_rows=self.num_rows,
            tables=self.staging.device[self._tables_start :],
            table_stride_at=self._line("stride"),
            chunks=None,
        )

    def clear(self) -> None:
        """Fill in a step that reads and writes no block."""
        self.staging.device.zero_()
        for index in range(len(self.layout.groups)):
            self._line(f"slots {index}").fill_(-1)

    def fill(self, batch: PackedBatch) -> None:
        """Copy decode rows that fit, behind the device's queued work."""
        stride = batch.block_tables[0].shape[1]
        content = self.staging.host()
        slots = slots_of(batch.block_tables, batch, self.layout.block_size)
        # | stride | lengths      | token_ids | .. | slots 0      | .. | tables, row by row ..
        #            9 8 7 0 0 ..               5 6 7 -1 -1 ..         stride entries each
        # What pads the rows of a batch:  0, and -1 for slots.
        lines: dict[str, tuple[IntArray, int]] = {
            "lengths": (batch.context_lengths, 0),
            "token_ids": (batch.token_ids, 0),
            "positions": (batch.positions, 0),
            **{f"slots {index}": (group_slots, -1) for index, group_slots in enumerate(slots)},
        }
        for name, (line, padding) in lines.items():
            place = content[self._places[name]]
            place[: len(line)] = line
            place[len(line) :] = padding
        content[0] = stride
        num_groups = len(batch.block_tables)
        used = self._tables_start + num_groups * self.num_rows * stride
        tables = content[self._tables_start : used].reshape(num_groups, self.num_rows, stride)
        tables[:, : batch.num_rows] = np.stack(batch.block_tables)
        self.staging.send(used)

    def _line(self, name: str) -> torch.Tensor:
        return self.staging.device[self._places[name]]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Allocate a buffer, pinned where there is a device.

    torch keeps pinned memory until the copies that were queued from it are done, then gives it out
    again.
    """
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
