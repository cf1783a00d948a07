"""Attention with torch's operators against float64."""

from __future__ import annotations

import pytest
import torch

from pdlaunch.engine.models.torch_attention import TorchAttention
from tests.engine.models.attention_reference import Case, make_inputs, reference, relative_error

MIXED = ((500, 1), (3, 1), (0, 60), (20, 7), (64, 33))
DECODE = ((0, 1), (16, 1), (77, 1))


@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_equals_float64(
    rows: tuple[tuple[int, int], ...], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = make_inputs(Case(rows, dtype=dtype))
    inputs.kv_cache.nan_to_num_(7)  # what is not attended to is multiplied by zero
    for layer in (1, 2):
        kv_cache, expected = reference(inputs, layer, 0.125)
        step = TorchAttention(inputs.layout, inputs.kv_cache).prepare(inputs.batch)
        found = step.attend(layer, inputs.query, inputs.key, inputs.value, 0.125)
        assert torch.equal(inputs.kv_cache, kv_cache)
        error = relative_error(found, expected)
        assert error < tolerance, (layer, error)
