"""Finding prefixes on device and host, compared with trying every length."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.offload.jobs import JobFinished, JobMerger, OffloadJob
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.offload.tier import HostTier

BLOCK_SIZE = 4


def hashes(count: int) -> list[bytes]:
    return [bytes([index]) for index in range(count)]


def make_planner(
    windows: list[int | None], num_chunks: int = 200, blocks_per_chunk: int = 1
) -> tuple[OffloadPlanner, HostTier]:
    tier = HostTier(num_chunks)
    groups = [KVCacheGroup((index,), window) for index, window in enumerate(windows)]
    return OffloadPlanner(groups, BLOCK_SIZE, tier, blocks_per_chunk=blocks_per_chunk), tier


def ok(job: OffloadJob) -> JobFinished:
    return JobFinished(job.job_id, True, num_bytes=10, seconds=0.5)


def tables_of(first: list[int], end: int) -> BlockTables:
    tables = BlockTables(len(first))
    tables.append(
        first,
        [list(range(100 * group + start, 100 * group + end)) for group, start in enumerate(first)],
    )
    return tables


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
    planner, tier = make_planner(windows)
    blocks = st.sets(st.integers(0, num_blocks - 1)) if num_blocks else st.just(set())
    on_device = [data.draw(blocks) for _ in windows]
    on_host = [data.draw(blocks) for _ in windows]
    for group, indices in enumerate(on_host):
        for index in indices:
            chunk_id = tier.begin_store(group, bytes([index]))
            assert chunk_id is not None
            tier.finish_store(chunk_id, ok=True)

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
        assert hit.chunk_ids[group] == [
            tier.find(group, bytes([index])) for index in range(end, longest)
        ]
        assert hit.num_blocks_to_load(group) == longest - end


def test_stores_what_became_full_and_loads_it_back() -> None:
    planner, _ = make_planner([None, 9])
    # The sliding group has given its blocks 0 and 1 back.
    (store,) = planner.begin_stores(tables_of([0, 2], 5), hashes(5), 0, 4)
    assert store.direction == "store"
    assert store.block_ids == [0, 1, 2, 3, 102, 103]
    assert store.group_sizes == [4, 2]
    assert store.block_indices == [0, 2]
    assert store.chunk_hashes == [*hashes(4), *hashes(4)[2:]]
    assert list(planner.block_ids_in_flight("store")) == store.block_ids
    assert planner.begin_stores(tables_of([0, 2], 5), hashes(5), 0, 4) == []
    assert planner.find(hashes(5), 5, lambda _group, _hash: None) is None
    planner.check_integrity()
    assert planner.finish(ok(store)) is store
    hit = planner.find(
        hashes(5), 5, lambda group, block_hash: 7 if (group, block_hash) == (0, b"\0") else None
    )
    assert hit is not None
    # Block 4 was not full; the token after block 3 sees blocks 2 and 3 of the sliding group.
    assert (hit.end, hit.device.first, hit.device.block_ids) == (4, [0, 2], [[7], []])
    load = planner.begin_load(hit, [[20, 21, 22], [23, 24]], hashes(5))
    assert load.group_sizes == [3, 2]
    assert load.block_indices == [1, 2]
    assert load.chunk_ids == [*store.chunk_ids[1:4], *store.chunk_ids[4:]]
    assert load.chunk_hashes == [*hashes(4)[1:], *hashes(4)[2:]]
    planner.check_integrity()
    planner.finish(ok(load))
    planner.check_integrity()


def test_chunks_of_several_blocks_are_stored_when_full_and_loaded_from_inside() -> None:
    planner, tier = make_planner([None, 5], blocks_per_chunk=3)
    assert planner.begin_stores(tables_of([0, 0], 2), hashes(2), 0, 2) == []
    (store,) = planner.begin_stores(tables_of([0, 4], 8), hashes(8), 2, 7)
    # Chunks [0, 3) and [3, 6) of the full group; of the sliding one, block 3 had left the window.
    assert store.block_ids == [0, 1, 2, 3, 4, 5, 104, 105]
    assert (store.group_sizes, store.block_indices) == ([6, 2], [0, 4])
    assert store.chunk_hashes == [b"\2", b"\5", b"\5"]
    planner.finish(ok(store))
    assert tier.find(1, b"\5", slot=0) is None
    hit = planner.find(
        hashes(8), 5, lambda group, block_hash: 50 if group == 0 and block_hash < b"\1" else None
    )
    assert hit is not None
    assert (hit.end, hit.device.first, hit.device.block_ids) == (5, [0, 4], [[50], []])
    load = planner.begin_load(hit, [[1, 2, 3, 4], [5]], hashes(8))
    assert (load.group_sizes, load.block_indices) == ([4, 1], [1, 4])
    assert load.chunk_ids == store.chunk_ids
    planner.check_integrity()


def test_gaps_make_several_store_jobs() -> None:
    planner, _ = make_planner([None])
    (middle,) = planner.begin_stores(tables_of([0], 3), hashes(3), 1, 2)
    first, second = planner.begin_stores(tables_of([0], 4), hashes(4), 0, 4)
    assert (middle.block_ids, first.block_ids, second.block_ids) == ([1], [0], [2, 3])
    assert (first.block_indices, second.block_indices) == ([0], [2])
    planner.check_integrity()


def test_ranks_reports_become_one() -> None:
    merger = JobMerger(2)
    assert merger.add(JobFinished(1, True, num_bytes=5, seconds=0.1)) is None
    assert merger.add(JobFinished(2, True, num_bytes=5, seconds=0.1)) is None
    merged = merger.add(JobFinished(1, False, "broken", [4], num_bytes=6, seconds=0.3))
    assert merged == JobFinished(1, False, "broken", [4], num_bytes=11, seconds=0.3)
    assert merger.add(JobFinished(2, True, num_bytes=5, seconds=0.2)) == JobFinished(
        2, True, num_bytes=10, seconds=0.2
    )
