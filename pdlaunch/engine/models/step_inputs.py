"""Copies between host and device for which the host does not wait: the integer inputs of a step's
kernels, in one transfer, and small tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.models.attention import BoolArray, FloatArray, IntArray, PackedBatch

# Arrays begin at multiples of 16 bytes, because Triton compiles again for other pointers.
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The integer inputs of a step. Tensors are int32 on the device."""

    num_decode_rows: int  # the first rows; the other rows are chunks of prompts
    slots: Sequence[torch.Tensor]  # [num_tokens] by group; -1: write nothing
    lengths: torch.Tensor  # [num_rows]; 0: a row without tokens
    tables: torch.Tensor  # [num_groups * num_rows * table_stride]
    table_stride_at: torch.Tensor  # [1]
    # Chunks
    chunk_lengths: list[int] = field(default_factory=list)
    # [num_chunks + 1]; first token of each chunk, counted from the first chunk's first token
    chunk_starts: torch.Tensor | None = None
    # Slots of the tokens before the chunks, by group; empty if all chunks begin their prompts.
    prefix_slots: Sequence[torch.Tensor] = ()  # [num_gathered_tokens]
    prefix_starts: Sequence[torch.Tensor] = ()  # [num_chunks + 1]
    longest_prefixes: Sequence[int] = ()


def upload_int32(
    arrays: Mapping[str, IntArray | list[IntArray]], device: torch.device
) -> dict[str, Any]:
    """Return flat int32 copies of ``arrays`` on ``device``, and a list of copies for each list, in
    one transfer for which the host does not wait.
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
            # The next array begins at a multiple of ALIGNMENT.
            start += _aligned(array.size)
        uploaded[name] = parts if isinstance(arrays[name], list) else parts[0]
    copied.copy_(host, non_blocking=True)
    return uploaded


def slots_of(batch: PackedBatch, block_size: int) -> list[IntArray]:
    """Return for each KV cache group [num_tokens]: each token's block * block_size + offset."""
    blocks, offsets = np.divmod(batch.positions, block_size)
    return [
        table[batch.row_of_token, blocks] * block_size + offsets for table in batch.block_tables
    ]


_STRIDE, _LENGTHS, _TOKEN_IDS, _POSITIONS, _SLOTS = range(5)


class GraphInputs:
    """The inputs of decode steps with up to ``max_rows`` rows, at fixed addresses for CUDA graphs.

    A device buffer and a pinned host buffer have the same layout: lines of ``max_rows`` integers,
    of which each group has one for its slots, then the block tables. Block tables are as wide as
    the step's longest context, so that only the used part is copied. A graph of ``num_rows`` is
    padded with rows of length 0 and slots of -1, which read and write nothing::

        stride 3 │ lengths 9 8 7 0 0 │ token_ids .. │ positions .. │ slots 5 6 7 -1 -1 │ tables ..
    """

    def __init__(
        self, layout: KVCacheLayout, max_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        """``max_blocks``: the number of blocks of the longest row."""
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
        """Return the inputs of attention in a step of ``num_rows`` rows."""
        return StepTensors(
            num_decode_rows=num_rows,
            slots=[*self._lines[_SLOTS:, :num_rows]],
            lengths=self._lines[_LENGTHS, :num_rows],
            tables=self._device[self._tables_start :],
            table_stride_at=self._lines[_STRIDE, :1],
        )

    def clear(self) -> None:
        """Fill in the inputs of a step that reads and writes no block."""
        self._device.zero_()
        self._lines[_SLOTS:] = -1

    def fill(self, batch: PackedBatch, num_rows: int) -> None:
        """Enqueue the copy of decode rows to the device, for a graph of ``num_rows``."""
        if self._sent is not None:
            # Wait until the previous copy has read the host buffer.
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
    # Torch reuses pinned memory only after the queued copies from it have ended.
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")


class Download:
    """Copies small tensors from ``device`` to the host, after the work already queued there."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = [
            tensor
            if tensor.device.type == "cpu"
            else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[torch.Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def upload(
    values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return [len(values)] on ``device``; the host does not wait for the copy."""
    return _send(torch.tensor(values, dtype=dtype), device)


def upload_array(array: IntArray | FloatArray | BoolArray, device: torch.device) -> torch.Tensor:
    """Return the array on ``device`` without waiting; on a CPU it shares the array's memory."""
    return _send(torch.from_numpy(array), device)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and len(tensor)
        else tensor.to(device)
    )
