"""Finding prefixes on device and host, compared with trying every length."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

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
