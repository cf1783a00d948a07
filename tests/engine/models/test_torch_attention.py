"""Attention with torch's operators against float64, and attention sinks against transformers' own
code.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from pdlaunch.engine.models.torch_attention import TorchAttention
from tests.engine.models.attention_reference import Case, make_inputs, reference, relative_error

MIXED = ((500, 1), (3, 1), (0, 60), (20, 7), (64, 33))
DECODE = ((0, 1), (16, 1), (77, 1))


@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_equals_float64(
    rows: tuple[tuple[int, int], ...], has_sinks: bool, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = make_inputs(Case(rows, dtype=dtype, has_sinks=has_sinks))
    inputs.kv_cache.nan_to_num_(7)  # what is not attended to is multiplied by zero
    for layer in (1, 2):
        kv_cache, expected = reference(inputs, layer, 0.125)
        step = TorchAttention(inputs.layout, inputs.kv_cache).prepare(inputs.batch)
        found = step.attend(layer, inputs.query, inputs.key, inputs.value, 0.125, inputs.sinks)
        assert torch.equal(inputs.kv_cache, kv_cache)
        error = relative_error(found, expected)
        assert error < tolerance, (layer, error)


def test_sinks_are_those_of_transformers() -> None:
    """A whole prompt; the sinks are large enough to matter."""
    inputs = make_inputs(Case(((0, 40),), windows=(None,), has_sinks=True))
    assert inputs.sinks is not None
    sinks, mask = inputs.sinks * 3, torch.full((40, 40), float("-inf")).triu(1)
    module = SimpleNamespace(num_key_value_groups=3, sinks=sinks, training=False)
    states = (inputs.query, inputs.key, inputs.value)
    expected, _ = eager_attention_forward(
        module, *(each[None] for each in states), mask[None, None], 0.125
    )
    step = TorchAttention(inputs.layout, inputs.kv_cache).prepare(inputs.batch)
    torch.testing.assert_close(step.attend(0, *states, 0.125, sinks), expected[0])
    assert relative_error(step.attend(0, *states, 0.125), expected[0].double()) > 0.1
