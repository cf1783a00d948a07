"""What a step of ``TritonAttention`` reads on the device, and how decode cuts contexts into
splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

TARGET_PROGRAMS = 1024
"""Programs that fill the device: eight for each of an H200's multiprocessors."""
MAX_SPLITS = 32


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How decode cuts contexts; fixed at launch, whatever the lengths are."""

    num_splits: int
    """Most splits of a row; a power of two."""
    min_tokens: int

    @staticmethod
    def of(num_rows: int, num_kv_heads: int) -> SplitPlan:
        """Many splits for few rows; rows that fill the device alone are cut only where they are
        long.
        """
        wanted = -(-TARGET_PROGRAMS // (num_rows * num_kv_heads))
        min_tokens = 1024 if wanted == 1 else 256 if wanted <= 4 else 32
        return SplitPlan(min(MAX_SPLITS, max(8, triton.next_power_of_2(wanted))), min_tokens)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of a layer's queries and keys."""

    query: torch.Tensor
    """[D]"""
    key: torch.Tensor
    """[D]"""
    epsilon: float
    offset: int = 0
    """Added to all weights."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of one group that flash attention has to see, as a gather makes them."""

    slots: torch.Tensor
    """[num_gathered_tokens] int32"""
    starts: torch.Tensor
    """[num_chunks + 1] int32"""
    longest: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """The rows after the decode rows."""

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
    """By group; None: no chunk has anything before it."""
    lengths: tuple[int, ...]
    """Tokens of each chunk, if cuDNN can do them: long ones without anything before them. Else
    empty.
    """


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's integers on the device."""

    slots: tuple[torch.Tensor, ...]
    """By group: [num_tokens] int32; -1 writes nothing"""
    lengths: torch.Tensor
    """[num_rows] int32"""
    tables: torch.Tensor
    """[num_groups * num_rows * table_stride] int32"""
    table_stride_at: torch.Tensor
    """[1] int32"""
    num_decode_rows: int
    chunks: Chunks | None
