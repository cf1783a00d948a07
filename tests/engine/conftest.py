"""Fixtures of tests on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pdlaunch.engine.memory.pools import CuMemPools


@pytest.fixture
def pools() -> Iterator[CuMemPools]:
    """CuMem pools of the first GPU, in which nothing may be left at the end."""
    import torch

    from pdlaunch.engine.memory.pools import CuMemPools, open_memory_pools

    found = open_memory_pools(enabled=True, device=torch.device("cuda", 0))
    assert isinstance(found, CuMemPools)
    yield found
    gc.collect()
    torch.cuda.empty_cache()
    assert not found._allocations
