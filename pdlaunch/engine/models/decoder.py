"""The model as the runner sees it: packed tokens in, logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pdlaunch.engine.models.attention import AttentionStep


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
