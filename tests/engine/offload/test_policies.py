"""Eviction policies: which key leaves, and how they compare on a small multi-turn trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.offload.policies import ARC, LRU, EvictionPolicy
from tests.engine.offload.policy_trace import POLICIES, TraceShape, hit_rate, make_trace

MAKERS = {"lru": LRU, "arc": lambda: ARC(8)}


@pytest.mark.parametrize("name", sorted(MAKERS))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "touch", "remove", "evict"]),
            st.integers(0, 15),
            st.sets(st.integers(0, 15)),
        )
    )
)
def test_holds_the_keys_that_were_added_and_did_not_leave(
    name: str, steps: list[tuple[str, int, set[int]]]
) -> None:
    policy: EvictionPolicy[int] = MAKERS[name]()
    keys: set[int] = set()
    for step, key, pinned in steps:
        if step == "evict":
            victim = policy.evict(lambda candidate, pinned=pinned: candidate not in pinned)
            assert (victim is None) == (keys <= pinned)
            if victim is not None:
                assert victim in keys - pinned
                keys.remove(victim)
        elif key not in keys:
            policy.add(key)
            keys.add(key)
        elif step == "remove":
            policy.remove(key)
            keys.remove(key)
        else:
            policy.touch(key)
        assert sorted(policy) == sorted(keys)
        assert len(policy) == len(keys)


def test_lru_evicts_what_was_unused_for_longest() -> None:
    policy: LRU[int] = LRU()
    for key in (1, 2, 3):
        policy.add(key)
    policy.touch(1)
    assert [policy.evict(lambda _: True) for _ in range(4)] == [2, 3, 1, None]


def test_arc_keeps_what_is_used_again_when_a_scan_passes() -> None:
    policy: ARC[int] = ARC(4)
    for key in (1, 2):
        policy.add(key)
        policy.touch(key)
    for scanned in range(100, 200):
        policy.add(scanned)
        if len(policy) > 4:
            policy.evict(lambda _: True)
    assert {1, 2} <= set(policy)


SMALL = TraceShape(num_requests=400, num_chats_at_once=30, mean_think_requests=30.0)


def test_arc_is_near_lru_on_chats_and_ahead_of_it_with_documents() -> None:
    def rate(policy: str, shape: TraceShape) -> float:
        return hit_rate(POLICIES[policy](1500), 1500, make_trace(shape, 3))

    chats = replace(SMALL, document_share=0.0)
    assert rate("arc", chats) > rate("lru", chats) - 0.03
    assert rate("arc", SMALL) > rate("lru", SMALL) + 0.03
