"""Finding prefixes on device and host, compared with trying every length. The host tier: what is
found, pinned, evicted.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.offload.planner import BlockKey, HostTier, OffloadPlanner

BLOCK_SIZE = 4


def hashes(count: int) -> list[bytes]:
    return [bytes([index]) for index in range(count)]


def make_planner(windows: list[int | None]) -> OffloadPlanner:
    groups = [KVCacheGroup((index,), window) for index, window in enumerate(windows)]
    return OffloadPlanner(groups, BLOCK_SIZE, HostTier(200))


@settings(deadline=None)
@given(
    data=st.data(),
    windows=st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3),
    num_blocks=st.integers(0, 9),
    max_blocks=st.integers(0, 12),
)
def test_finds_the_longest_prefix(
    data: st.DataObject, windows: list[int | None], num_blocks: int, max_blocks: int
) -> None:
    planner = make_planner(windows)
    tier = planner.tier
    blocks = st.sets(st.integers(0, num_blocks - 1)) if num_blocks else st.just(set())
    on_device = [data.draw(blocks) for _ in windows]
    on_host = [data.draw(blocks) for _ in windows]
    for group, indices in enumerate(on_host):
        for index in indices:
            host_id = tier.begin_store(BlockKey(group, bytes([index])))
            assert host_id is not None
            tier.finish_store(host_id, ok=True)

    def find_on_device(group: int, block_hash: bytes) -> int | None:
        return 100 * group + block_hash[0] if block_hash[0] in on_device[group] else None

    def first_visible(group: int, length: int) -> int:
        window = windows[group]
        return 0 if window is None else max(0, length * BLOCK_SIZE - window + 1) // BLOCK_SIZE

    def split(group: int, length: int) -> int | None:
        """Where the device's run ends, if the rest of what is visible is on the host."""
        place = first_visible(group, length)
        while place < length and place in on_device[group]:
            place += 1
        return place if set(range(place, length)) <= on_host[group] else None

    limit = min(max_blocks, num_blocks)
    fitting = [
        length
        for length in range(limit + 1)
        if all(split(group, length) is not None for group in range(len(windows)))
    ]
    longest = max(fitting)
    hit = planner.find(hashes(num_blocks), max_blocks, find_on_device)
    if all(split(group, longest) == longest for group in range(len(windows))):
        assert hit is None
        return
    assert hit is not None
    assert hit.end == longest
    for group in range(len(windows)):
        end = split(group, longest)
        assert hit.device.first[group] == first_visible(group, longest)
        assert hit.device.block_ids[group] == [
            100 * group + index for index in range(first_visible(group, longest), end)
        ]
        assert hit.host_ids[group] == [
            tier.find(group, bytes([index])) for index in range(end, longest)
        ]


def key_of(number: int, group: int = 0) -> BlockKey:
    return BlockKey(group, bytes([number]))


def stored(tier: HostTier, number: int) -> int:
    host_id = tier.begin_store(key_of(number))
    assert host_id is not None
    tier.finish_store(host_id, ok=True)
    return host_id


def test_the_least_recently_used_makes_room() -> None:
    tier = HostTier(4)
    first, *_ = [stored(tier, number) for number in range(4)]
    assert tier.num_evicted_blocks == 0
    tier.begin_load([first])
    tier.finish_load([first])
    stored(tier, 4)
    assert tier.num_evicted_blocks == 1
    assert [number for number in range(5) if tier.find(*key_of(number)) is None] == [1]


class TierMachine(RuleBasedStateMachine):
    """Stores and loads in flight, in any order, ending well or not; the model is what may at most
    be found.
    """

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.tier = HostTier(num_blocks)
        self.storing: dict[int, BlockKey] = {}
        self.loads: list[list[int]] = []
        self.content: dict[int, BlockKey] = {}

    @rule(group=st.integers(0, 1), number=st.integers(0, 9))
    def begin_store(self, group: int, number: int) -> None:
        host_id = self.tier.begin_store(key_of(number, group))
        if host_id is not None:
            assert host_id not in self.storing
            assert all(host_id not in load for load in self.loads)
            self.content.pop(host_id, None)
            self.storing[host_id] = key_of(number, group)

    @precondition(lambda self: self.storing)
    @rule(data=st.data(), ok=st.booleans())
    def finish_store(self, data: st.DataObject, ok: bool) -> None:
        host_id = data.draw(st.sampled_from(sorted(self.storing)))
        content = self.storing.pop(host_id)
        self.tier.finish_store(host_id, ok=ok)
        if ok:
            self.content[host_id] = content
        assert (self.tier.find(*content) == host_id) == ok

    @rule(group=st.integers(0, 1), numbers=st.lists(st.integers(0, 9), unique=True, max_size=4))
    def begin_load(self, group: int, numbers: list[int]) -> None:
        load = []
        for number in numbers:
            host_id = self.tier.find(*key_of(number, group))
            if host_id is not None:
                assert self.content[host_id] == key_of(number, group)
                load.append(host_id)
        self.tier.begin_load(load)
        self.loads.append(load)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def finish_load(self, data: st.DataObject) -> None:
        load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        failed = data.draw(st.sets(st.sampled_from(load))) if load else set()
        self.tier.finish_load(load, failed)
        for host_id in failed:
            assert self.tier.find(*self.content[host_id]) != host_id

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "tier"):
            loading = [host_id for load in self.loads for host_id in load]
            self.tier.check_integrity(storing=self.storing, loading=loading)
            assert self.tier.num_used_blocks <= self.tier.num_blocks


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
