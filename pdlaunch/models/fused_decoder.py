"""The decoder of Llama and its kin with fewer, larger operations, on CUDA devices.

Takes the weights of a loaded transformers model. Per layer ten launches instead of some forty: norms with the residual's
addition, queries, keys and values from one product, rotation with the write into the KV cache, gate and up projection from one
product. Import this module only where triton is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import nn
from torch.nn.functional import linear

from pdlaunch.models.attention import AttentionStep
from pdlaunch.models.decoder import TransformersDecoder
from pdlaunch.models.layer_kernels import add_and_normalize, gate_with_silu
from pdlaunch.models.stacked_weights import join
from pdlaunch.models.triton_attention import TritonStep

FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"}
"""Models of exactly this shape: two RMS norms a layer, rotation by halves or none, ``down(silu(gate(x)) * up(x))``."""
GATE_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm."""

    weight: torch.Tensor
    """[size]"""
    epsilon: float

    @staticmethod
    def of(module: Any) -> Norm:
        return Norm(module.weight, float(module.variance_epsilon))


@dataclass(frozen=True, slots=True)
class Stacked:
    """Linear layers of the same input, one below the other."""

    weight: torch.Tensor
    """[sum of out_features, in_features]"""
    bias: torch.Tensor | None

    @staticmethod
    def of(*layers: nn.Linear) -> Stacked:
        """The layers' parameters have to be loaded ``stacked``: no memory is taken."""
        weight = join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert weight is not None
        assert len(biases) in (0, len(layers))
        return Stacked(weight, join(biases) if biases else None)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return linear(inputs, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm
    qkv: Stacked
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    """Of queries and keys: weights and epsilon."""
    rotates: bool
    output: nn.Module
    middle_norm: Norm
    gate_and_up: Stacked
    down: nn.Module

    @staticmethod
    def of(layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query_norm = getattr(attention, "q_norm", None)
        return Layer(
            input_norm=Norm.of(layer.input_layernorm),
            qkv=Stacked.of(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=query_norm and (query_norm.weight, attention.k_norm.weight, float(query_norm.variance_epsilon)),
            rotates=bool(getattr(attention, "use_rope", True)),
            output=attention.o_proj,
            middle_norm=Norm.of(layer.post_attention_layernorm),
            gate_and_up=Stacked.of(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )


class FusedDecoder:
    """A ``Decoder``; ``model`` is one that ``can_fuse`` accepts, loaded ``stacked``."""

    def __init__(self, model: Any) -> None:
        self._plain = TransformersDecoder(model)
        self._embed = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._layers = [Layer.of(layer) for layer in model.model.layers]
        self._scaling = float(model.model.layers[0].self_attn.scaling)
        self._norm = Norm.of(model.model.norm)
        self._head = model.lm_head

    @property
    def can_be_captured(self) -> bool:
        return self._plain.can_be_captured

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor | None, step: AttentionStep
    ) -> torch.Tensor:
        assert isinstance(step, TritonStep)
        residual = self._embed(token_ids)
        cosines, sines = self._rotary(residual[None], positions[None])
        rotary = (cosines[0], sines[0])
        hidden: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = _normalize(hidden, residual, layer.input_norm)
            turned = rotary if layer.rotates else None
            attended = step.rotate_and_attend(index, layer.qkv(normed), turned, self._scaling, layer.head_norms)
            hidden = layer.output(attended.flatten(1))
            normed = _normalize(hidden, residual, layer.middle_norm)
            hidden = layer.down(_gate(layer.gate_and_up(normed)))
        assert hidden is not None
        if kept is not None:
            hidden, residual = hidden[kept], residual[kept]
        logits: torch.Tensor = self._head(_normalize(hidden, residual, self._norm))
        return logits


def can_fuse(model: Any) -> bool:
    """Whether ``FusedDecoder`` computes what ``model`` does."""
    return type(model).__name__ in FAMILIES and model.config.hidden_act == "silu"


def _normalize(hidden: torch.Tensor | None, residual: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``residual += hidden``, in place; returns its norm. All [num_tokens, size]."""
    result = torch.empty_like(residual)
    size = residual.shape[1]
    if len(residual):
        add_and_normalize[(len(residual),)](
            residual if hidden is None else hidden,
            residual,
            norm.weight,
            result,
            norm.epsilon,
            SIZE=size,
            PADDED_SIZE=triton.next_power_of_2(size),
            ADDS=hidden is not None,
            num_warps=8 if size >= 4096 else 4,
        )
    return result


def _gate(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[num_tokens, 2 * size] to [num_tokens, size]"""
    num_tokens, size = len(gate_and_up), gate_and_up.shape[1] // 2
    result = gate_and_up.new_empty((num_tokens, size))
    gate_with_silu[(num_tokens, triton.cdiv(size, GATE_COLUMNS))](gate_and_up, result, SIZE=size, COLUMNS=GATE_COLUMNS)
    return result
