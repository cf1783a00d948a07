from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlaunch.engine.memory.allocations import AllocationTable
from pdlaunch.errors import MemoryPoolError
from tests.engine.memory.fake_driver import FakeDriver

TAG_NAMES = ("weights", "kv_cache", "other")
FALLIBLE = (
    "reserve",
    "create",
    "map",
    "set_access",
    "synchronize",
    "allocate_host",
    "copy_to_host",
    "copy_to_device",
    "export",
)

tag_sets = st.sets(st.sampled_from(TAG_NAMES))


class Table(RuleBasedStateMachine):
    """Random lives of pools, with a driver that fails at any call; what was kept must come back,
    nothing may leak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = FakeDriver(device_bytes=40 * 8)
        self.table = AllocationTable(self.driver)
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
            address = self.table.allocate(num_bytes, tag)
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
        self.table.free(address)
        del self.tags[address], self.sizes[address]
        self.known.pop(address, None)

    @rule(tags=tag_sets, keep=tag_sets)
    def sleep(self, tags: set[str], keep: set[str]) -> None:
        expected = sum(
            self.sizes[address] for address, tag in self.tags.items() if tag in tags - self.sleeping
        )
        free_before = self.driver.used_bytes
        try:
            given_back = self.table.sleep(tags, keep)
        except MemoryPoolError:
            assert self.driver.used_bytes == free_before
            return
        assert given_back == expected == free_before - self.driver.used_bytes
        for address, tag in self.tags.items():
            if tag in tags - self.sleeping - keep:
                self.known.pop(address, None)
        self.sleeping |= tags

    @rule(tags=tag_sets)
    def wake(self, tags: set[str]) -> None:
        before = self.driver.used_bytes
        try:
            taken = self.table.wake(tags)
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
        self.table.check_integrity()
        assert self.table.sleeping_tags == self.sleeping
        awake = (size for at, size in self.sizes.items() if self.tags[at] not in self.sleeping)
        assert self.driver.used_bytes == sum(awake)
        assert (
            self.table.num_bytes()
            == sum(self.sizes.values())
            == sum(found.num_bytes for found in self.driver.ranges.values())
        )
        num_kept = sum(self.tags[address] in self.sleeping for address in self.known)
        assert len(self.driver.hosts) == num_kept
        for address, content in self.known.items():
            if self.tags[address] not in self.sleeping:
                assert self.driver.memory(address) == content

    def teardown(self) -> None:
        self.driver.work()
        for address in list(self.tags):
            self.table.free(address)
        assert not self.driver.ranges
        assert not self.driver.physical
        assert not self.driver.hosts


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_addresses_stay_and_kept_bytes_come_back() -> None:
    driver = FakeDriver()
    table = AllocationTable(driver)
    weights, cache = table.allocate(20, "weights"), table.allocate(8, "kv_cache")
    driver.memory(weights)[:] = b"w" * 24
    assert table.sleep(["weights", "kv_cache"], keep=["weights"]) == 32
    assert driver.used_bytes == 0
    assert len(driver.hosts) == 1
    assert table.wake(["weights"]) == 24
    assert driver.memory(weights) == b"w" * 24
    assert not driver.hosts
    assert table.sleeping_tags == {"kv_cache"}
    assert table.wake(["kv_cache"]) == 8
    assert len(driver.memory(cache)) == 8


def test_a_sleeping_pool_allocates_nothing() -> None:
    table = AllocationTable(FakeDriver())
    table.sleep(["kv_cache"], keep=[])
    with pytest.raises(
        MemoryPoolError, match="8 bytes were asked of the pool 'kv_cache' while it sleeps"
    ):
        table.allocate(8, "kv_cache")
    table.allocate(8, "weights")


def test_waking_without_room_names_bytes_and_tags_and_changes_nothing() -> None:
    driver = FakeDriver(device_bytes=32)
    table = AllocationTable(driver)
    for _ in range(4):
        table.allocate(8, "kv_cache")
    table.sleep(["kv_cache"], keep=["kv_cache"])
    driver.device_bytes = 24
    with pytest.raises(
        MemoryPoolError,
        match="32 bytes of kv_cache cannot wake up: cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY",
    ):
        table.wake(["kv_cache"])
    assert driver.used_bytes == 0
    assert len(driver.hosts) == 4
    driver.device_bytes = 32
    assert table.wake(["kv_cache"]) == 32


def test_the_handle_of_an_address_is_that_of_its_awake_allocation() -> None:
    driver = FakeDriver()
    table = AllocationTable(driver)
    weights, cache = table.allocate(8, "weights"), table.allocate(16, "kv_cache")
    found = table.exported_handle(cache + 15)
    assert found is not None
    assert (found.tag, found.address, found.num_bytes, found.kind, found.handle) == (
        "kv_cache",
        cache,
        16,
        "posix_fd",
        1,
    )
    assert table.exported_handle(cache + 16) is None
    table.sleep(["weights"], keep=[])
    assert table.exported_handle(weights) is None
    driver.fail("export")
    with pytest.raises(MemoryPoolError, match="memory of 'kv_cache' cannot be shared: export"):
        table.exported_handle(cache)


def test_fabric_handles_are_bytes() -> None:
    table = AllocationTable(FakeDriver(handle_kind="fabric"))
    found = table.exported_handle(table.allocate(8, "kv_cache"))
    assert found is not None
    assert found.kind == "fabric"
    assert isinstance(found.handle, bytes)
    assert len(found.handle) == 64
