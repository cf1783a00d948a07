"""The seam between transformers models and backends: packed tokens in, logits out, with attention
over the paged KV cache.

The function registered with transformers hands each layer's queries, keys and values to the step
that the runner passed to the model as ``attention_step``. Backends write keys and values into the
KV cache and attend over it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

# Name by which transformers finds the function; it has no mask function, so no masks are built
ATTENTION_NAME = "pdlaunch_paged"


class AttentionStep(ABC):
    """Attends over the KV cache for one step; made by a backend, used by every layer once."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write keys and values of the step's tokens into the KV cache, and attend over it.

        Returns [num_tokens, num_heads, head_dim]. ``query``: [num_heads, num_tokens, head_dim];
        ``key``, ``value``: [num_kv_heads, num_tokens, head_dim]; heads of this rank, rotary
        embedding applied. Query head h belongs to KV head h // (num_heads / num_kv_heads).
        """


class AttentionBackend(ABC):
    """Prepares steps; owns nothing but its view of the KV cache and work space."""

    # Slots past a row's context are never read. Otherwise whatever lies there has to be finite.
    reads_only_context = False

    def warm_up(self, num_heads: int, max_tokens: int, progress: ReportProgress) -> None:  # noqa: B027 - most have nothing to do
        """Do once what the first step of each size would. ``num_heads``: of this rank."""

    @abstractmethod
    def prepare(self, batch: PackedBatch) -> AttentionStep:
        """Compute once what all layers of the step share; of one step at a time."""


def register_attention() -> None:
    """Tell transformers about our attention function. Safe to call again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: None,
    *,
    scaling: float,
    attention_step: AttentionStep,
    **_: object,
) -> tuple[torch.Tensor, None]:
    # Query: [1, num_heads, num_tokens, head_dim]; result: [1, num_tokens, num_heads, head_dim].
    attended = attention_step.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return attended[None], None


IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Holds rows one after another; rows of one token (decode) come first.

    ``|d0|d1|d2|p0 p0 p0 p0|p1 p1|``: three decode rows, then two chunks of prompts.
    """

    token_ids: IntArray  # [num_tokens]
    # [num_tokens]; index within the request, from num_computed_tokens of its row on
    positions: IntArray
    row_of_token: IntArray  # [num_tokens]
    row_starts: IntArray  # [num_rows + 1]; tokens of row i are [row_starts[i], row_starts[i + 1])
    # [num_rows]; tokens of the row that the KV cache holds after this step
    context_lengths: IntArray
    # [num_rows, max_blocks] by group; stale past the context and before the window
    block_tables: tuple[IntArray, ...]
    num_decode_rows: int  # leading rows of exactly one token

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)


class Decoder:
    """Computes logits of packed tokens over the paged KV cache, by the model's own code.

    A CUDA graph can replay it: no model that is served waits for the device, or depends on values
    there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor | None,
        step: AttentionStep,
    ) -> torch.Tensor:
        """Return [len(kept), vocab_size] of the tokens ``kept``; None keeps all.

        ``token_ids``, ``positions``: [num_tokens].
        """
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if kept is None else kept,
            attention_step=step,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


# Called with what is done now and the fraction that is complete; None where that is unknown
ReportProgress = Callable[[str, float | None], None]
