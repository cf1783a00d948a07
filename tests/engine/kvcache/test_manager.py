from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.engine.kvcache.manager import BlockPool, KVCacheManager

WINDOWS = st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=3)


def make_groups(windows: list[int | None]) -> list[KVCacheGroup]:
    return [KVCacheGroup((0,), window) for window in windows]


def hashes(num_blocks: int, block_size: int) -> list[bytes]:
    hasher = TokenHasher(root_hash("m"), block_size)
    hasher.extend(range(num_blocks * block_size))
    return hasher.block_hashes


def visible_blocks(window: int | None, num_computed: int, block_size: int) -> set[int]:
    """Logical blocks before ``num_computed`` that the query at that token sees, by its
    definition.
    """
    start = 0 if window is None else max(0, num_computed - window + 1)
    return {position // block_size for position in range(start, num_computed)}


def fill(kv: KVCacheManager, cached: list[set[int]], block_hashes: list[bytes]) -> None:
    for group, indices in enumerate(cached):
        for index in indices:
            (block_id,) = kv.pool.allocate(1)
            kv.pool.register(block_id, group, block_hashes[index])
            kv.pool.release([block_id])


@given(WINDOWS, st.integers(1, 4), st.integers(0, 10), st.data())
def test_prefix_is_the_longest_from_which_every_group_can_go_on(
    windows: list[int | None], block_size: int, num_blocks: int, data: st.DataObject
) -> None:
    kv = KVCacheManager(make_groups(windows), 64, block_size)
    block_hashes = hashes(10, block_size)
    # Mostly cached: a hit of some length is likely.
    missing = [data.draw(st.sets(st.integers(0, 9), max_size=3)) for _ in windows]
    cached = [set(range(10)) - gone for gone in missing]
    fill(kv, cached, block_hashes)
    lengths = [
        length
        for length in range(num_blocks + 1)
        if all(
            visible_blocks(window, length * block_size, block_size) <= cached[group]
            for group, window in enumerate(windows)
        )
    ]
    hit = kv.find_prefix(block_hashes, num_blocks)
    assert {hit.end(group) for group in range(len(windows))} == {lengths[-1]}
    for group, window in enumerate(windows):
        seen = visible_blocks(window, lengths[-1] * block_size, block_size)
        assert set(range(hit.first[group], hit.end(group))) == seen
        assert hit.block_ids[group] == [
            kv.pool.find(group, block_hashes[index]) for index in sorted(seen)
        ]


@given(WINDOWS, st.integers(1, 4), st.integers(1, 40))
def test_min_blocks_suffice_token_by_token(
    windows: list[int | None], block_size: int, num_tokens: int
) -> None:
    num_blocks = KVCacheManager(make_groups(windows), 0, block_size).min_blocks(num_tokens)
    assert compute_token_by_token(
        KVCacheManager(make_groups(windows), num_blocks, block_size), num_tokens
    )


def test_fewer_than_min_blocks_do_not_suffice() -> None:
    num_blocks = KVCacheManager(make_groups([None, 6]), 0, 4).min_blocks(40)
    assert num_blocks == 10 + 3
    assert not compute_token_by_token(KVCacheManager(make_groups([None, 6]), num_blocks - 1, 4), 40)


def compute_token_by_token(kv: KVCacheManager, num_tokens: int) -> bool:
    tables = kv.new_tables()
    for num_computed in range(num_tokens):
        kv.release_left(tables, num_computed)
        if not kv.extend(tables, num_computed + 1):
            return False
    return True


# Which blocks a pool gives out and finds; test_scheduler_machine has any history of moves


def registered(pool: BlockPool, count: int) -> list[int]:
    block_ids = pool.allocate(count)
    for block_id in block_ids:
        pool.register(block_id, 0, bytes([block_id]))
    return block_ids


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4, 1)
    cached = registered(pool, 2)
    pool.release(cached)
    pool.allocate(2)
    assert all(pool.find(0, bytes([block_id])) == block_id for block_id in cached)


def test_cached_blocks_are_reused_in_the_order_of_their_release() -> None:
    pool = BlockPool(3, 1)
    head, middle, tail = registered(pool, 3)
    pool.release([tail, middle, head])
    assert pool.allocate(1) == [tail]
    assert pool.find(0, bytes([tail])) is None
    assert pool.find(0, bytes([head])) == head
