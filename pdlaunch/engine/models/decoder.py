"""The model as the runner sees it: packed tokens in, logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pdlaunch.engine.models.attention import AttentionStep

_ROTARY_WITH_STATE = {"dynamic", "longrope"}
"""Kinds of rotary embedding whose frequencies depend on the longest position, read on the host."""


class Decoder:
    """Computes logits of packed tokens over the paged KV cache, by the model's own code."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    @property
    def can_be_captured(self) -> bool:
        """Return whether a CUDA graph may replay a step.

        Nothing in it may wait for the device or depend on values there.
        """
        # The host may have to know how many tokens each expert gets.
        has_experts = bool(getattr(self._model.config, "num_local_experts", 0))
        return not has_experts and not _rotary_types(self._model) & _ROTARY_WITH_STATE

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


def _rotary_types(model: nn.Module) -> set[str]:
    types: set[str] = set()
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        types |= set(kind.values()) if isinstance(kind, dict) else {kind} - {None}
    return types
