"""Weights of layers with the same input, side by side in memory for one product.

They are put there while loading: stacking afterwards would leave the memory of the single weights
with the allocator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module, in the order of their outputs."""


class StackedPlaces:
    """Gives weights and biases of stacked layers their places.

    The memory of a stack is allocated with its first member.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Begin without stacks. ``shapes``: of all parameters by name, as this rank holds them."""
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._stacks: dict[tuple[str, ...], torch.Tensor] = {}

    def place(self, name: str) -> torch.Tensor | None:
        """Return a contiguous part of the stack, with anything in it; None: this parameter stands
        alone.
        """
        members = self._members(name)
        if not members:
            return None
        rows = [self._shapes[member][0] for member in members]
        if members not in self._stacks:
            size = (sum(rows), *self._shapes[name][1:])
            self._stacks[members] = torch.empty(size, dtype=self._dtype, device=self._device)
        start = sum(rows[: members.index(name)])
        return self._stacks[members][start : start + self._shapes[name][0]]

    def _members(self, name: str) -> tuple[str, ...]:
        module, _, kind = name.rpartition(".")
        parent, _, layer = module.rpartition(".")
        for stack in STACKS:
            members = tuple(f"{parent}.{member}.{kind}" for member in stack)
            if layer in stack and all(member in self._shapes for member in members):
                return members
        return ()


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return, in place, the tensor of which ``parts`` are neighbours along dimension 0.

    None if they are not, in their order.
    """
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
    size = (sum(len(part) for part in parts), *first.shape[1:])
    if (
        first.storage_offset() * first.element_size() + end - first.data_ptr()
        > first.untyped_storage().nbytes()
    ):
        return None
    return first.detach().as_strided(size, first.stride())
