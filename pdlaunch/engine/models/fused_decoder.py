"""The decoder of Llama, Gemma 3 and similar models, with fewer and larger kernels on CUDA devices.

It uses the weights of a loaded transformers model. A layer launches ten kernels instead of about
forty: a norm also adds to the residual; one product computes queries, keys and values, and another
the gate and up projections; the rotary embedding also writes into the KV cache. Import this module
only if triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import nn
from torch.nn.functional import linear

from pdlaunch.engine.models.attention import AttentionStep, Decoder
from pdlaunch.engine.models.kernels import add_and_normalize, multiply_gated
from pdlaunch.engine.models.triton_attention import Norm, TritonStep

GELU = "gelu_pytorch_tanh"
# Models with RMS norms, ``down(activation(gate(x)) * up(x))``, and rotation by halves or none
ACTIVATIONS = {
    "LlamaForCausalLM": "silu",
    "MistralForCausalLM": "silu",
    "Qwen2ForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
    "SmolLM3ForCausalLM": "silu",
    "Gemma3ForCausalLM": GELU,
}
GATE_COLUMNS = 1024
Product = Callable[[torch.Tensor], torch.Tensor]  # multiplies by a layer's weights
Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [num_tokens, D]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer."""

    input_norm: Norm
    qkv: Product
    head_norms: tuple[Norm, Norm] | None  # for queries and keys
    # This layer's arguments for the model's rotary embedding; None: no rotation
    rotary: tuple[str, ...] | None
    output: nn.Module
    output_norm: Norm | None  # for the output, before it is added to the residual
    middle_norm: Norm
    gate_and_up: Product
    down: nn.Module
    down_norm: Norm | None  # for the output of ``down``, before it is added to the residual

    @staticmethod
    def of(layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        is_gemma = type(layer).__name__ == "Gemma3DecoderLayer"
        has_norms = getattr(attention, "q_norm", None) is not None
        rotary = (attention.config.layer_types[attention.layer_idx],) if is_gemma else ()
        return Layer(
            input_norm=_norm(layer.input_layernorm),
            qkv=_stacked(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if has_norms else None,
            rotary=rotary if getattr(attention, "use_rope", True) else None,
            output=attention.o_proj,
            output_norm=_norm(layer.post_attention_layernorm) if is_gemma else None,
            middle_norm=_norm(
                layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm
            ),
            gate_and_up=_stacked(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
            down_norm=_norm(layer.post_feedforward_layernorm) if is_gemma else None,
        )


class FusedDecoder(Decoder):
    """Computes logits with a model that ``can_fuse`` accepts, loaded ``stacked``."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._embed = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._layers = [Layer.of(layer) for layer in model.model.layers]
        self._scaling = float(model.model.layers[0].self_attn.scaling)
        self._norm = _norm(model.model.norm)
        self._is_gelu = _activation(model) == GELU
        self._head = model.lm_head

    def logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor | None,
        step: AttentionStep,
    ) -> torch.Tensor:
        assert isinstance(step, TritonStep)
        residual = self._embed(token_ids)
        rotaries = self._rotaries(residual, positions)
        # ``hidden`` is the output of a sublayer. The kernel of the next norm adds it to the
        # residual; for Gemma, it first applies ``hidden_norm``.
        hidden: torch.Tensor | None = None
        hidden_norm: Norm | None = None
        for index, layer in enumerate(self._layers):
            normed = _normalize(hidden, residual, layer.input_norm, hidden_norm)
            rotary = None if layer.rotary is None else rotaries[layer.rotary]
            attended = step.rotate_and_attend(
                index, layer.qkv(normed), rotary, self._scaling, layer.head_norms
            )
            hidden = layer.output(attended.flatten(1))
            normed = _normalize(hidden, residual, layer.middle_norm, layer.output_norm)
            hidden = layer.down(_multiply_gated(layer.gate_and_up(normed), is_gelu=self._is_gelu))
            hidden_norm = layer.down_norm
        assert hidden is not None
        if kept is not None:
            hidden, residual = hidden[kept], residual[kept]
        logits: torch.Tensor = self._head(_normalize(hidden, residual, self._norm, hidden_norm))
        return logits

    def _rotaries(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> dict[tuple[str, ...], Rotary]:
        found: dict[tuple[str, ...], Rotary] = {}
        for layer in self._layers:
            if layer.rotary is not None and layer.rotary not in found:
                cosines, sines = self._rotary(hidden[None], positions[None], *layer.rotary)
                found[layer.rotary] = (cosines[0], sines[0])
        return found


def _stacked(*layers: nn.Linear) -> Product:
    """Return a product with the weights of all ``layers``, which were loaded ``stacked``."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    weight = _join([layer.weight for layer in layers])
    return partial(linear, weight=weight, bias=_join(biases) if biases else None)


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a view of the tensor that ``parts`` make up, which are contiguous in memory."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        assert part.data_ptr() == end, "the weights are not stacked"
        assert part.is_contiguous()
        end += part.numel() * part.element_size()
    size = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(size, first.stride())


def can_fuse(model: Any) -> bool:
    """Return True if ``FusedDecoder`` computes the same as ``model``."""
    is_capped = getattr(model.config, "final_logit_softcapping", None) is not None
    activation = ACTIVATIONS.get(type(model).__name__)
    return activation is not None and activation == _activation(model) and not is_capped


def _activation(model: Any) -> str | None:
    name: str | None = getattr(model.config, "hidden_activation", None)
    return name or getattr(model.config, "hidden_act", None)


def _norm(module: Any) -> Norm:
    if type(module).__name__ == "Gemma3RMSNorm":
        return Norm(module.weight, float(module.eps), offset=1)
    return Norm(module.weight, float(module.variance_epsilon))


def _normalize(
    hidden: torch.Tensor | None, residual: torch.Tensor, norm: Norm, hidden_norm: Norm | None = None
) -> torch.Tensor:
    """Add ``hidden``, after ``hidden_norm`` if there is one, to ``residual`` in place. Return the
    norm of ``residual``. All are [num_tokens, size].
    """
    result = torch.empty_like(residual)
    size = residual.shape[1]
    if len(residual):
        add_and_normalize[(len(residual),)](
            residual if hidden is None else hidden,
            residual,
            norm.weight if hidden_norm is None else hidden_norm.weight,
            norm.weight,
            result,
            norm.epsilon,
            SIZE=size,
            PADDED_SIZE=triton.next_power_of_2(size),
            ADDS=hidden is not None,
            NORMALIZES_HIDDEN=hidden_norm is not None,
            NORM_OFFSET=norm.offset,
            num_warps=8 if size >= 4096 else 4,
        )
    return result


def _multiply_gated(gate_and_up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    """Return ``activation(gate) * up``: [num_tokens, size] from [num_tokens, 2 * size]."""
    num_tokens, size = len(gate_and_up), gate_and_up.shape[1] // 2
    result = gate_and_up.new_empty((num_tokens, size))
    grid = (num_tokens, triton.cdiv(size, GATE_COLUMNS))
    multiply_gated[grid](gate_and_up, result, SIZE=size, COLUMNS=GATE_COLUMNS, IS_GELU=is_gelu)
    return result
