"""The host tier: what is found, pinned, evicted; an integrity check after every operation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.engine.offload.tier import HostTier


def name(number: int) -> bytes:
    return number.to_bytes(4, "little")


def stored(tier: HostTier, number: int, group: int = 0, first_slot: int = 0) -> int:
    chunk_id = tier.begin_store(group, name(number), first_slot)
    assert chunk_id is not None
    tier.finish_store(chunk_id, ok=True)
    return chunk_id


def test_slots_that_had_left_the_window_are_not_found_and_a_fuller_chunk_replaces_it() -> None:
    tier = HostTier(4)
    first = stored(tier, 1, first_slot=2)
    assert tier.find(0, name(1), slot=1) is None
    assert tier.find(0, name(1), slot=2) == first
    assert tier.begin_store(0, name(1), first_slot=3) is None
    tier.begin_load([first])
    assert tier.begin_store(0, name(1), first_slot=0) is None
    tier.finish_load([first])
    fuller = stored(tier, 1, first_slot=0)
    assert tier.find(0, name(1), slot=0) == fuller
    assert tier.num_used_chunks == 1


def test_the_least_recently_used_makes_room() -> None:
    tier = HostTier(4)
    first, *_ = [stored(tier, number) for number in range(4)]
    assert tier.num_evicted_chunks == 0
    tier.begin_load([first])
    tier.finish_load([first])
    stored(tier, 4)
    assert tier.num_evicted_chunks == 1
    assert [number for number in range(5) if tier.find(0, name(number)) is None] == [1]


def test_what_is_in_flight_never_leaves() -> None:
    tier = HostTier(2)
    loaded = stored(tier, 1)
    tier.begin_load([loaded])
    storing = tier.begin_store(0, name(2))
    assert storing is not None
    assert tier.begin_store(0, name(3)) is None
    assert tier.num_refused_chunks == 1
    tier.finish_load([loaded])
    assert tier.begin_store(0, name(3)) == loaded
    tier.check_integrity(storing=[storing, loaded])


def test_a_chunk_that_failed_is_a_miss_at_once_and_free_after_its_last_load() -> None:
    tier = HostTier(3)
    chunk_id = stored(tier, 1)
    tier.begin_load([chunk_id])
    tier.begin_load([chunk_id])
    tier.finish_load([chunk_id], [chunk_id])
    assert tier.find(0, name(1)) is None
    tier.check_integrity(loading=[chunk_id])
    replacement = stored(tier, 1)
    assert replacement != chunk_id
    tier.finish_load([chunk_id], [chunk_id])
    assert tier.find(0, name(1)) == replacement
    tier.check_integrity()


class TierMachine(RuleBasedStateMachine):
    """Stores and loads in flight, in any order, ending well or not; the model is what may at most
    be found.
    """

    @initialize(num_chunks=st.integers(1, 8))
    def start(self, num_chunks: int) -> None:
        self.tier = HostTier(num_chunks)
        self.storing: dict[int, tuple[int, int]] = {}
        self.loads: list[list[int]] = []
        self.content: dict[int, tuple[int, int]] = {}

    @rule(group=st.integers(0, 1), number=st.integers(0, 9), first_slot=st.integers(0, 2))
    def begin_store(self, group: int, number: int, first_slot: int) -> None:
        chunk_id = self.tier.begin_store(group, name(number), first_slot)
        if chunk_id is not None:
            assert chunk_id not in self.storing
            assert all(chunk_id not in load for load in self.loads)
            self.content.pop(chunk_id, None)
            self.storing[chunk_id] = (group, number)

    @precondition(lambda self: self.storing)
    @rule(data=st.data(), ok=st.booleans())
    def finish_store(self, data: st.DataObject, ok: bool) -> None:
        chunk_id = data.draw(st.sampled_from(sorted(self.storing)))
        content = self.storing.pop(chunk_id)
        self.tier.finish_store(chunk_id, ok=ok)
        if ok:
            self.content[chunk_id] = content
        assert (self.tier.find(content[0], name(content[1]), slot=2) == chunk_id) == ok

    @rule(group=st.integers(0, 1), numbers=st.lists(st.integers(0, 9), unique=True, max_size=4))
    def begin_load(self, group: int, numbers: list[int]) -> None:
        found = [(self.tier.find(group, name(number), slot=2), number) for number in numbers]
        load = []
        for chunk_id, number in found:
            if chunk_id is not None:
                assert self.content[chunk_id] == (group, number)
                load.append(chunk_id)
        self.tier.begin_load(load)
        self.loads.append(load)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def finish_load(self, data: st.DataObject) -> None:
        load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        failed = data.draw(st.sets(st.sampled_from(load))) if load else set()
        self.tier.finish_load(load, failed)
        for chunk_id in failed:
            group, number = self.content[chunk_id]
            assert self.tier.find(group, name(number), slot=2) != chunk_id

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "tier"):
            loading = [chunk_id for load in self.loads for chunk_id in load]
            self.tier.check_integrity(storing=self.storing, loading=loading)
            assert self.tier.num_used_chunks <= self.tier.num_chunks


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_check_sees_a_lost_pin() -> None:
    tier = HostTier(2)
    tier.begin_load([stored(tier, 1)])
    with pytest.raises(AssertionError, match="pins"):
        tier.check_integrity()
