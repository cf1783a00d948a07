"""The kernel that normalizes and rotates queries and keys and writes the KV cache, against float64,
wherever Triton runs.
"""

from __future__ import annotations

import torch

from pdlaunch.engine.models.triton_attention import Norm, TritonAttention
from tests.engine.models.attention_reference import Case, make_inputs, reference, relative_error

EPSILON = 1e-5


def check_rotation(
    case: Case, *, has_norms: bool, rotates: bool, tolerance: float, device: str = "cpu"
) -> None:
    """``rotate_and_attend`` writes and attends as the reference does with heads that were turned
    beforehand.
    """
    inputs = make_inputs(case, device)
    scaling, num_heads, num_kv_heads = case.head_dim**-0.5, case.num_heads, case.num_kv_heads
    heads = torch.cat([inputs.query, inputs.key, inputs.value]).transpose(0, 1).contiguous()
    angles = (torch.rand(len(heads), case.head_dim // 2) * 7).repeat(1, 2)
    turns = angles.cos().to(device, case.dtype), angles.sin().to(device, case.dtype)
    rotary = turns if rotates else None
    weights = (torch.rand(2, case.head_dim) + 0.5).to(device, case.dtype)
    inputs.query = turned(inputs.query, rotary, weights[0] if has_norms else None)
    inputs.key = turned(inputs.key, rotary, weights[1] if has_norms else None)
    # A number halfway between two of the dtype may be rounded to either.
    exactness = max(1e-5, 2 * torch.finfo(case.dtype).eps)
    # An offset of 1 and weights that are smaller by 1, which is exact here, are the same norm.
    for layer, offset in ((1, 0), (2, 1)):
        norms = (
            (Norm(weights[0] - offset, EPSILON, offset), Norm(weights[1] - offset, EPSILON, offset))
            if has_norms
            else None
        )
        kv_cache, expected = reference(inputs, layer, scaling)
        step = TritonAttention(inputs.layout, inputs.kv_cache).prepare(inputs.batch)
        projected = heads.clone().view(len(heads), -1)
        found = step.rotate_and_attend(layer, projected, rotary, scaling, norms)
        written = inputs.kv_cache.cpu().nan_to_num(9)
        torch.testing.assert_close(written, kv_cache.nan_to_num(9), rtol=exactness, atol=exactness)
        left = projected.view_as(heads).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        for states, wanted in zip(left, (inputs.query, inputs.key, inputs.value), strict=True):
            torch.testing.assert_close(
                states, wanted.transpose(0, 1), rtol=exactness, atol=exactness
            )
        error = relative_error(found, expected)
        assert error < tolerance, (case, layer, error)


def turned(
    states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """``states``: [heads, num_tokens, D]; computed in float64, rounded once."""
    exact = states.double()
    if weight is not None:
        exact = exact * (exact.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
    if rotary is not None:
        first, second = exact.chunk(2, dim=-1)
        exact = (
            exact * rotary[0].double() + torch.cat([-second, first], dim=-1) * rotary[1].double()
        )
    return exact.to(states.dtype)
