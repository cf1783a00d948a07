"""Finding prefixes on device and host, compared with trying every length."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.offload.planner import BlockKey, HostTier, JobFinished, OffloadPlanner

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


def test_stores_what_became_full_and_loads_it_back() -> None:
    planner = make_planner([None, 9])
    tables = BlockTables(2)
    # The sliding group has given its blocks 0 and 1 back.
    tables.append([0, 2], [[0, 1, 2, 3, 4], [102, 103, 104]])
    store = planner.begin_store(tables, hashes(5), range(4))
    assert store is not None
    assert (store.direction, store.block_ids) == ("store", [0, 1, 2, 3, 102, 103])
    assert store.keys == [(0, name) for name in hashes(4)] + [(1, name) for name in hashes(4)[2:]]
    assert list(planner.block_ids_in_flight("store")) == store.block_ids
    assert planner.begin_store(tables, hashes(5), range(4)) is None, "all are being stored"
    assert planner.find(hashes(5), 5, lambda _group, _hash: None) is None
    planner.check_integrity()
    assert planner.finish(JobFinished(store.job_id, True)) is store
    hit = planner.find(
        hashes(5), 5, lambda group, block_hash: 7 if (group, block_hash) == (0, b"\0") else None
    )
    assert hit is not None
    # Block 4 was not full; the token after block 3 sees blocks 2 and 3 of the sliding group.
    assert (hit.end, hit.device.first, hit.device.block_ids) == (4, [0, 2], [[7], []])
    load = planner.begin_load(hit, [[20, 21, 22], [23, 24]], hashes(5))
    assert (load.block_ids, load.host_ids, load.keys) == (
        [20, 21, 22, 23, 24],
        store.host_ids[1:],
        store.keys[1:],
    )
    planner.check_integrity()
    planner.finish(JobFinished(load.job_id, True))
    planner.check_integrity()
