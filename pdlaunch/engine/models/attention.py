"""The interface between transformers models and attention backends. A model computes logits of
packed tokens with attention over the paged KV cache.

The runner passes ``attention_step`` to the model. Our attention function, which is registered with
transformers, passes each layer's queries, keys and values on to that step. A backend's step writes
keys and values into the KV cache and attends over it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

# Name of our function in transformers, which builds no masks without a mask function of that name.
ATTENTION_NAME = "pdlaunch_paged"


IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The tokens of a step, row after row. Decode rows, which have one token, come first:
    ``|d0|d1|d2|p0 p0 p0 p0|p1 p1|`` are three decode rows, then two chunks of prompts.
    """

    token_ids: IntArray  # [num_tokens]
    # [num_tokens]; index within the request; a row begins at its num_computed_tokens
    positions: IntArray
    row_of_token: IntArray  # [num_tokens]
    row_starts: IntArray  # [num_rows + 1]; tokens of row i are [row_starts[i], row_starts[i + 1])
    # [num_rows]; number of the row's tokens in the KV cache after this step
    context_lengths: IntArray
    # [num_rows, max_blocks] by group; undefined past the context and before the window
    block_tables: tuple[IntArray, ...]
    num_decode_rows: int  # number of leading rows with exactly one token

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)


# Called with the current stage and the complete fraction; None: unknown
ReportProgress = Callable[[str, float | None], None]


class AttentionStep(ABC):
    """Attends over the KV cache in one step. A backend makes it; each layer uses it once."""

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
        ``key``, ``value``: [num_kv_heads, num_tokens, head_dim]. All have this rank's heads, after
        the rotary embedding. Query head h uses KV head h // (num_heads / num_kv_heads).
        """


class AttentionBackend(ABC):
    """Prepares steps. Owns only its work space."""

    # True: slots past a row's context are never read. False: they must hold finite numbers.
    reads_only_context = False

    def warm_up(self, num_heads: int, max_tokens: int, progress: ReportProgress) -> None:  # noqa: B027 - most have nothing to do
        """Do now the set-up that first steps would do. ``num_heads``: query heads of this rank."""

    @abstractmethod
    def prepare(self, batch: PackedBatch) -> AttentionStep:
        """Compute the inputs that all layers of a step share. Only one step may be in use."""


def register_attention() -> None:
    """Register our attention function with transformers. May be called again."""
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


class Decoder:
    """Computes logits of packed tokens over the paged KV cache with the model's own code. CUDA
    graphs can replay it, because no supported model waits for the device or branches on values
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
        """Return [len(kept), vocab_size], the logits of the tokens ``kept``; None: of all."""
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if kept is None else kept,
            attention_step=step,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
