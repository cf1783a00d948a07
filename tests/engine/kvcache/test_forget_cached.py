from __future__ import annotations

from pdlaunch.engine.kvcache.block_pool import BlockPool


def test_nothing_is_found_and_every_block_is_free() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    for group, block_id in enumerate(blocks[:2]):
        pool.register(block_id, group, b"hash")
    pool.release(blocks)
    pool.forget_cached()
    pool.check_integrity()
    assert pool.find(0, b"hash") is None
    assert pool.find(1, b"hash") is None
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
