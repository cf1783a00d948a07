"""Weights of layers with the same input, side by side in memory for one product.

They get their places before loading: stacking afterwards would leave the memory of the single
weights with the allocator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module, in the order of their outputs."""


def place_stacks(
    model: nn.Module, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> None:
    """Give the weights and biases of stacked layers their memory, with anything in it.

    ``shapes``: of all parameters by name, as this rank holds them.
    """
    for parent_name, parent in model.named_modules():
        for stack in STACKS:
            for kind in ("weight", "bias"):
                names = [f"{parent_name}.{layer}.{kind}" for layer in stack]
                if not all(name in shapes for name in names):
                    continue
                rows = [shapes[name][0] for name in names]
                whole = torch.empty((sum(rows), *shapes[names[0]][1:]), dtype=dtype, device=device)
                for layer, part in zip(stack, torch.split(whole, rows), strict=True):
                    parameter = nn.Parameter(part, requires_grad=False)
                    setattr(parent.get_submodule(layer), kind, parameter)


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return, in place, the tensor of which ``parts`` are neighbours, as stacks are."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        assert part.data_ptr() == end, "the weights are not stacked"
        assert part.is_contiguous()
        end += part.numel() * part.element_size()
    size = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(size, first.stride())
