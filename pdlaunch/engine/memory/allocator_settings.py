"""The settings of torch's allocator in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pdlaunch.machine.allocator_conf import VARIABLES, expandable_segments_variable


def read_allocator_settings() -> str:
    """Raises KeyError when this version of torch reports them in an unknown way."""
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if get is not None:
        return str(get())
    # torch 2.11 tells them in snapshots only.
    found: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
    return str(next(found[name] for name in VARIABLES if name in found))


@contextlib.contextmanager
def expandable_segments_off() -> Iterator[None]:
    """Switch expandable segments off inside the block: they bypass a pool's allocator."""
    before = read_allocator_settings()
    if not expandable_segments_variable({VARIABLES[0]: before}):
        yield
        return
    accelerator: Any = torch._C
    accelerator._accelerator_setAllocatorSettings(f"{before},expandable_segments:False")
    try:
        yield
    finally:
        accelerator._accelerator_setAllocatorSettings(before)
