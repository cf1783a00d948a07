"""Pools over a driver that only pretends; pools on a device are in test_cuda.py."""

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlaunch.engine.memory.kv_memory import SharedRange
from pdlaunch.engine.memory.pools import CuMemPools, open_memory_pools
from pdlaunch.errors import ConfigError, MemoryPoolError
from tests.engine.memory.fake_driver import FakeDriver

TAG_NAMES = ("weights", "kv_cache", "other")
FALLIBLE = (
    *("reserve", "create", "map", "set_access", "synchronize"),
    *("allocate_host", "copy_to_host", "copy_to_device", "export"),
)

tag_sets = st.sets(st.sampled_from(TAG_NAMES))


def pools_over(driver: Any) -> CuMemPools:
    return CuMemPools(driver, torch.device("cuda", 0))


class PoolsMachine(RuleBasedStateMachine):
    """Random lives of pools, with a driver that fails at any call; what was kept must come back,
    nothing may leak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = FakeDriver(device_bytes=40 * 8)
        self.pools = pools_over(self.driver)
        self.tags: dict[int, str] = {}
        self.sizes: dict[int, int] = {}
        self.known: dict[int, bytes] = {}
        """What must be in the memory of an allocation, asleep or awake; missing: dropped, and
        undefined until it wakes up.
        """
        self.sleeping: set[str] = set()

    @rule(num_bytes=st.integers(1, 80), tag=st.sampled_from(TAG_NAMES), byte=st.integers(0, 255))
    def allocate(self, num_bytes: int, tag: str, byte: int) -> None:
        before = self.driver.used_bytes, len(self.driver.ranges)
        try:
            address = self.pools.allocate(num_bytes, tag)
        except MemoryPoolError:
            assert (self.driver.used_bytes, len(self.driver.ranges)) == before
            return
        assert tag not in self.sleeping
        memory = self.driver.memory(address)
        assert num_bytes <= len(memory) < num_bytes + self.driver.page_bytes
        memory[:] = bytes([byte]) * len(memory)
        self.known[address] = bytes(memory)
        self.tags[address], self.sizes[address] = tag, len(memory)

    @precondition(lambda self: self.tags)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.driver.work()
        address = data.draw(st.sampled_from(sorted(self.tags)))
        self.pools.free(address)
        del self.tags[address], self.sizes[address]
        self.known.pop(address, None)

    @rule(tags=tag_sets, keep=tag_sets)
    def sleep(self, tags: set[str], keep: set[str]) -> None:
        expected = sum(
            self.sizes[address] for address, tag in self.tags.items() if tag in tags - self.sleeping
        )
        used_before = self.driver.used_bytes
        try:
            given_back = self.pools.sleep(tags, keep)
        except MemoryPoolError:
            assert self.driver.used_bytes == used_before
            return
        assert given_back == expected == used_before - self.driver.used_bytes
        for address, tag in self.tags.items():
            if tag in tags - self.sleeping - keep:
                self.known.pop(address, None)
        self.sleeping |= tags

    @rule(tags=tag_sets)
    def wake_up(self, tags: set[str]) -> None:
        before = self.driver.used_bytes
        try:
            taken = self.pools.wake_up(tags)
        except MemoryPoolError:
            assert self.driver.used_bytes == before
            return
        assert taken == self.driver.used_bytes - before
        self.sleeping -= tags
        for address, tag in self.tags.items():
            if tag not in self.sleeping:
                self.known.setdefault(address, bytes(self.driver.memory(address)))

    @rule(method=st.sampled_from(FALLIBLE), at=st.integers(0, 3))
    def break_driver(self, method: str, at: int) -> None:
        self.driver.fail(method, at)

    @rule()
    def repair_driver(self) -> None:
        self.driver.work()

    @rule(pages=st.integers(0, 60))
    def others_take_memory(self, pages: int) -> None:
        self.driver.device_bytes = pages * 8

    @invariant()
    def holds(self) -> None:
        assert self.pools.sleeping_tags == self.sleeping
        awake = (size for at, size in self.sizes.items() if self.tags[at] not in self.sleeping)
        assert self.driver.used_bytes == sum(awake)
        held = {address: found.num_bytes for address, found in self.driver.ranges.items()}
        assert held == self.sizes
        allocated = [each.num_bytes for each in self.pools._allocations.values()]
        assert sum(allocated) == sum(self.sizes.values())
        num_kept = sum(self.tags[address] in self.sleeping for address in self.known)
        assert len(self.driver.hosts) == num_kept
        for address, content in self.known.items():
            if self.tags[address] not in self.sleeping:
                assert self.driver.memory(address) == content

    def teardown(self) -> None:
        self.driver.work()
        for address in list(self.tags):
            self.pools.free(address)
        assert not self.driver.ranges
        assert not self.driver.handles
        assert not self.driver.hosts


TestPoolsMachine = PoolsMachine.TestCase
TestPoolsMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_waking_without_room_names_bytes_and_tags() -> None:
    driver = FakeDriver(device_bytes=32)
    pools = pools_over(driver)
    pools.allocate(32, "kv_cache")
    pools.sleep(["kv_cache"], keep=["kv_cache"])
    driver.device_bytes = 24
    with pytest.raises(
        MemoryPoolError,
        match="32 bytes of kv_cache cannot wake up: cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY",
    ):
        pools.wake_up(["kv_cache"])


def test_a_range_is_exported_by_the_handle_of_its_awake_allocation() -> None:
    driver = FakeDriver()
    pools = pools_over(driver)
    weights, cache = pools.allocate(8, "weights"), pools.allocate(16, "kv_cache")
    found = pools.export(cache + 5, 4)
    assert found is not None
    assert (found.range, found.fd) == (SharedRange("posix_fd", 16, 5, 4), 1)
    assert pools.export(cache + 16, 1) is None
    driver.handle_kind = "fabric"
    found = pools.export(cache, 16)
    assert found is not None
    assert (len(found.range.handle), found.fd) == (64, None)
    pools.sleep(["weights"])
    assert pools.export(weights, 8) is None
    driver.fail("export")
    with pytest.raises(MemoryPoolError, match="memory of 'kv_cache' cannot be shared: export"):
        pools.export(cache, 16)


def test_the_allocator_is_never_left_out_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="not supported on the current platform") as raised:
        open_memory_pools(enabled=True, device=torch.device("cpu"))
    assert raised.value.field == "enable_cumem_allocator"
    assert raised.value.fix is not None
