"""Gives output tokens that the host does not know yet to the next step as its input.

The host writes a number for each input token, the device looks it up in one table at an address
that stays:

    number   0   1   2  ..  vocab_size - 1 │ vocab_size + 0    vocab_size + 1  ..
    token    0   1   2  ..  vocab_size - 1 │ drawn first       drawn second    ..

"Drawn" tokens are those of the latest step that drew any.
"""

from __future__ import annotations

import torch


class LatestTokens:
    """Holds the table of one device. ``max_rows``: most tokens that a step draws."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._table = torch.arange(vocab_size + max_rows, device=device)
        self._table[vocab_size:] = 0

    def keep(self, token_ids: torch.Tensor) -> None:
        """Write the tokens that a step draws, [num_rows], in order, behind the device's queued
        work.
        """
        self._table[self._vocab_size : self._vocab_size + len(token_ids)].copy_(token_ids)

    def look_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the token ids of ``numbers``, both [num_tokens]; a CUDA graph can hold it."""
        return self._table.index_select(0, numbers)
