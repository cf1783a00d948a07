"""Which blocks a pool gives out and finds; ``test_scheduler_machine`` has any history of moves."""

from __future__ import annotations

from pdlaunch.engine.kvcache.manager import BlockPool


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


def test_nothing_is_found_and_every_block_is_free_once_the_content_is_lost() -> None:
    pool = BlockPool(4, 1)
    pool.release(registered(pool, 3))
    pool.forget_cached()
    pool.check_integrity()
    assert pool.find(0, b"\0") is None
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
