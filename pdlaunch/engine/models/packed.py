"""The tokens of one step, packed without padding: the runner builds them, backends read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Holds rows one after another; rows of one token (decode) come first.

    ``|d0|d1|d2|p0 p0 p0 p0|p1 p1|``: three decode rows, then two chunks of prompts.
    """

    token_ids: IntArray
    """[num_tokens]"""
    positions: IntArray
    """[num_tokens]; index within the request, from num_computed_tokens of its row on"""
    row_of_token: IntArray
    """[num_tokens]"""
    row_starts: IntArray
    """[num_rows + 1]; tokens of row i are [row_starts[i], row_starts[i + 1])"""
    context_lengths: IntArray
    """[num_rows]; tokens of the row that the KV cache holds after this step"""
    block_tables: tuple[IntArray, ...]
    """[num_rows, max_blocks] by KV cache group; entries past the context or before the window may
    be stale
    """
    num_decode_rows: int
    """Leading rows of exactly one token."""

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)
