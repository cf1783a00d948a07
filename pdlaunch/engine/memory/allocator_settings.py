"""Switches expandable segments off for a while, whatever else the user has set.

torch keeps one settings string a process; writing one replaces the other, and of repeated keys the
last wins. So the user's own string is written with one more key, and then as it was. Checked
against torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from pdlaunch.machine.allocator_conf import VARIABLES, expandable_segments_variable


class AllocatorSettings(Protocol):
    """Holds torch's allocator settings, as text in the form of PYTORCH_ALLOC_CONF."""

    def read(self) -> str: ...

    def write(self, text: str) -> None: ...


class TorchAllocatorSettings:
    """Reads and writes the settings of this process."""

    def read(self) -> str:
        """Raises KeyError when this version of torch reports them in an unknown way."""
        get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
        if get is not None:
            return str(get())
        # torch 2.11 tells them in snapshots only.
        found: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
        return str(next(found[name] for name in VARIABLES if name in found))

    def write(self, text: str) -> None:
        accelerator: Any = torch._C
        accelerator._accelerator_setAllocatorSettings(text)


@contextlib.contextmanager
def expandable_segments_off(settings: AllocatorSettings) -> Iterator[None]:
    """Switch expandable segments off inside the block: they reserve addresses themselves, and so
    bypass a pool's allocator.
    """
    before = settings.read()
    if not expandable_segments_variable({VARIABLES[0]: before}):
        yield
        return
    settings.write(f"{before},expandable_segments:False")
    try:
        yield
    finally:
        settings.write(before)
