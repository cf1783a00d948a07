"""Any history of moves: every block has one owner, content is found only where it still is."""

from __future__ import annotations

from itertools import chain

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pdlaunch.engine.kvcache.manager import BlockPool

NUM_GROUPS = 2
RANDOM = st.randoms(use_true_random=False)


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of ids; ``content`` is what a block was registered for since it was last
    given out.
    """

    @initialize(num_blocks=st.integers(0, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, NUM_GROUPS)
        self.owners: list[list[int]] = []
        self.pulls: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.content: dict[int, tuple[int, bytes]] = {}

    def pop(self, holders, choice):
        return holders.pop(choice.randrange(len(holders))) if holders else None

    def forget(self, block_ids):
        for block_id in block_ids:
            self.content.pop(block_id, None)

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        if count <= self.pool.num_free_blocks:
            self.owners.append(self.pool.allocate(count))
            self.forget(self.owners[-1])

    @rule(count=st.integers(0, 5))
    def allocate_for_pull(self, count):
        if count <= self.pool.num_free_blocks:
            self.pulls.append(self.pool.allocate_for_pull(count))
            self.forget(self.pulls[-1])

    @rule(choice=RANDOM, group=st.integers(0, NUM_GROUPS - 1), value=st.integers(0, 5))
    def register(self, choice, group, value):
        owned = [*chain(*self.owners)]
        if owned:
            block_id, key = choice.choice(owned), (group, bytes([value]))
            self.pool.register(block_id, *key)
            if block_id not in self.content and key not in self.content.values():
                self.content[block_id] = key

    @rule(choice=RANDOM)
    def share(self, choice):
        if shareable := sorted({*self.content, *chain(*self.owners)}):
            block_id = choice.choice(shareable)
            self.pool.share([block_id])
            self.owners.append([block_id])

    @rule(choice=RANDOM)
    def release(self, choice):
        self.pool.release(self.pop(self.owners, choice) or [])

    @rule(choice=RANDOM, end=st.sampled_from(["finish", "drop", "quarantine"]))
    def end_pull(self, choice, end):
        if (pull := self.pop(self.pulls, choice)) is None:
            return
        if end == "finish":
            self.pool.finish_pull(pull)
            self.owners.append(pull)
        elif end == "drop":
            self.pool.drop_pull(pull)
        else:
            self.pool.quarantine(pull)
            self.quarantined.append(pull)

    @rule(choice=RANDOM)
    def drain(self, choice):
        self.pool.drain(self.pop(self.quarantined, choice) or [])

    @invariant()
    def every_block_has_one_owner(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(
            owned=chain(*self.owners),
            pulling=chain(*self.pulls),
            quarantined=chain(*self.quarantined),
        )
        held = set(chain(*self.owners, *self.pulls, *self.quarantined))
        assert self.pool.num_free_blocks == self.pool.num_blocks - len(held)
        assert self.pool.num_quarantined_blocks == sum(map(len, self.quarantined))

    @invariant()
    def content_is_found_where_it_is(self):
        if hasattr(self, "pool"):
            for block_id, key in self.content.items():
                assert self.pool.find(*key) == block_id


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, report_multiple_bugs=False
)


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
