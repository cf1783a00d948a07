"""Holds the rows of the runner (each has the tokens, block tables and sampling parameters of one
request), and the drawn tokens that the host does not know yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.models.attention import FloatArray, IntArray, PackedBatch
from pdlaunch.engine.step import ScheduledRow, StepPlan
from pdlaunch.protocol.engine import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True)
class Row:
    """Holds one request in the runner: all that decides its next token, except the logits."""

    # [max_model_len + 1], a view into the table; the first ``num_tokens`` are known or expected
    token_ids: IntArray
    num_tokens: int
    num_prompt_tokens: int
    sampling: SamplingParams
    # Token ids and values of ``logit_bias`` as arrays; None if there are none
    bias: tuple[IntArray, FloatArray] | None = None
    # Logical index of the block whose slots past the row's last token are known to be zero
    clean_block: int = -1
    # State of the row's grammar after the first ``num_matched`` output tokens
    matcher: LLMatcher | None = None
    num_matched: int = 0

    @property
    def known(self) -> IntArray:
        return self.token_ids[: self.num_tokens]

    @property
    def output(self) -> IntArray:
        return self.token_ids[self.num_prompt_tokens : self.num_tokens]

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def changes_with_tokens(self) -> bool:
        """Return whether the row's tokens change its logits, which is computed row by row."""
        num_output = self.num_tokens - self.num_prompt_tokens
        return self.sampling.needs_output or num_output < self.sampling.min_tokens

    @property
    def changes_logits(self) -> bool:
        return self.bias is not None or self.changes_with_tokens

    def append(self, position: int, token_ids: list[int]) -> None:
        """Write tokens from ``position`` on; tokens that are known there already must be equal."""
        assert position <= self.num_tokens
        stop = position + len(token_ids)
        self.token_ids[position:stop] = token_ids
        self.num_tokens = max(self.num_tokens, stop)

    def expect(self, number: int) -> int:
        """Append ``number`` as a placeholder of a token not known yet; return its position."""
        self.append(self.num_tokens, [number])
        return self.num_tokens - 1


def new_row(
    token_ids: IntArray, known: list[int], num_prompt_tokens: int, sampling: SamplingParams
) -> Row:
    """Return a row that stores its tokens in ``token_ids`` and begins with ``known``."""
    bias = None
    if sampling.logit_bias:
        ids = np.array([*sampling.logit_bias], dtype=np.int64)
        bias = ids, np.array([*sampling.logit_bias.values()], dtype=np.float32)
    row = Row(token_ids, 0, num_prompt_tokens, sampling, bias)
    row.append(0, known)
    return row


class RowTable:
    """Holds all rows of a rank, and a block table [max_num_seqs, max_blocks] for each group."""

    def __init__(self, spec: EngineSpec, num_groups: int) -> None:
        self._block_size = spec.block_size
        self._rows: dict[int, Row] = {}
        num_rows, max_blocks = spec.max_num_seqs, -(-spec.max_model_len // spec.block_size)
        self._token_ids = np.zeros((num_rows, spec.max_model_len + 1), dtype=np.int64)
        self._block_tables = [
            np.zeros((num_rows, max_blocks), dtype=np.int64) for _ in range(num_groups)
        ]

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def apply(self, plan: StepPlan) -> None:
        # Free rows first: a new request may take one of them in the same step.
        for row in plan.freed_rows:
            del self._rows[row]
        for new in plan.new_rows:
            assert new.row not in self._rows, f"row {new.row} is taken"
            self._rows[new.row] = new_row(
                self._token_ids[new.row], new.token_ids, new.num_prompt_tokens, new.sampling
            )
        for tokens in plan.new_tokens:
            self._rows[tokens.row].append(tokens.position, tokens.token_ids)
        for blocks in plan.new_blocks:
            stop = blocks.first_block_index + len(blocks.block_ids)
            table = self._block_tables[blocks.group]
            table[blocks.row, blocks.first_block_index : stop] = blocks.block_ids

    def pack(self, scheduled: list[ScheduledRow]) -> PackedBatch:
        """Return the batch of one step. ``scheduled`` must have decode rows first."""
        counts = np.array([item.num_tokens for item in scheduled], dtype=np.int64)
        computed = np.array([item.num_computed_tokens for item in scheduled], dtype=np.int64)
        # row_starts    0    1    2                   5
        # tokens        | d0 | d1 | p0   p0     p0     |    decode rows, then chunks of prompts
        # positions       c0   c1   c2   c2+1   c2+2        c: computed tokens of the row
        row_starts = np.concatenate([[0], np.cumsum(counts)])
        row_of_token = np.repeat(np.arange(len(scheduled)), counts)
        positions = np.arange(len(row_of_token)) - row_starts[row_of_token] + computed[row_of_token]
        context_lengths = computed + counts
        max_blocks = -(-int(context_lengths.max()) // self._block_size)
        ids = np.array([item.row for item in scheduled])
        return PackedBatch(
            token_ids=self._token_ids[ids[row_of_token], positions],
            positions=positions,
            row_of_token=row_of_token,
            row_starts=row_starts,
            context_lengths=context_lengths,
            block_tables=tuple(table[ids, :max_blocks] for table in self._block_tables),
            num_decode_rows=int((counts == 1).sum()),
        )

    def clean(self, scheduled: list[ScheduledRow], kv_cache: torch.Tensor) -> None:
        """Set the slots past a row's last token to zero when the row reaches a new block, before
        this step writes to it.

        These slots may hold anything: values of another request, or of a failed transfer. Attention
        gives them weight 0, but 0 times NaN is NaN.
        """
        for item in scheduled:
            row, last = self._rows[item.row], item.num_computed_tokens + item.num_tokens - 1
            block, offset = divmod(last, self._block_size)
            if row.clean_block != block:
                row.clean_block = block
                block_ids = [int(table[item.row, block]) for table in self._block_tables]
                if offset + 1 < self._block_size:
                    kv_cache[block_ids, ..., offset + 1 :, :] = 0


class LatestTokens:
    """Passes output tokens that the host does not know yet to the next step.

    The host sends a number for each input token. The device looks the token up in a table, whose
    address is fixed::

        number   0   1   2  ..  vocab_size - 1 │ vocab_size + 0    vocab_size + 1  ..
        token    0   1   2  ..  vocab_size - 1 │ drawn first       drawn second    ..

    "Drawn" tokens, at most ``max_rows``, are those of the last step that drew any.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._table = torch.arange(vocab_size + max_rows, device=device)
        self._table[vocab_size:] = 0

    def keep(self, token_ids: torch.Tensor) -> None:
        self._table[self._vocab_size : self._vocab_size + len(token_ids)].copy_(token_ids)

    def look_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the token ids of ``numbers``, both [num_tokens]; a CUDA graph can capture this."""
        return self._table.index_select(0, numbers)
