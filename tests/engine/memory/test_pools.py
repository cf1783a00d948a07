"""Owners and the no-op; pools on a device are in test_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pdlaunch.engine.memory.allocations import AllocationTable
from pdlaunch.engine.memory.pools import CuMemPools, NoMemoryPools, open_memory_pools
from pdlaunch.errors import ConfigError, MemoryPoolError
from tests.engine.memory.fake_driver import FakeDriver


@pytest.fixture
def pools() -> Iterator[CuMemPools]:
    pools = CuMemPools(AllocationTable(FakeDriver()), torch.device("cuda", 0))
    yield pools
    pools.table = AllocationTable(FakeDriver())
    pools.close()


def test_a_second_owner_is_refused_until_the_first_has_closed(pools: CuMemPools) -> None:
    with pytest.raises(
        MemoryPoolError, match="has CuMem pools already, on cuda:0: close them first"
    ):
        CuMemPools(AllocationTable(FakeDriver()), torch.device("cuda", 1))
    pools.close()
    CuMemPools(AllocationTable(FakeDriver()), torch.device("cuda", 1)).close()


def test_memory_in_use_keeps_the_owner(pools: CuMemPools) -> None:
    address = pools.table.allocate(8, "weights")
    with pytest.raises(MemoryPoolError, match="8 bytes of the CuMem pools are still in use"):
        pools.close()
    pools.table.free(address)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_allocator_is_never_left_out_where_there_is_none(device: str) -> None:
    with pytest.raises(ConfigError, match="not supported on the current platform") as raised:
        open_memory_pools(enabled=True, device=torch.device(device))
    assert raised.value.field == "enable_cumem_allocator"
    assert raised.value.fix is not None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_the_allocator_pools_do_nothing(device: str) -> None:
    pools = open_memory_pools(enabled=False, device=torch.device(device))
    assert isinstance(pools, NoMemoryPools)
    with pools.memory_pool("weights"):
        torch.zeros(1)
    assert not pools.sleeping_tags
    assert pools.exported_handle(4096) is None
    with pytest.raises(MemoryPoolError, match="switch enable_sleep_mode on"):
        pools.sleep(["weights"])
    with pytest.raises(MemoryPoolError, match="does not sleep"):
        pools.wake_up(["weights"])
