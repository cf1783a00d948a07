"""Checksums that take their time, as on a GPU: nobody waits for them, nobody goes on without
them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_struct

from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    PullBegin,
    PullEnd,
    PullEndReply,
    PullReply,
    Refused,
    StateChecksums,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import LeaseEnded
from pdlaunch.transfer.leases import GRANT_LAG_S
from pdlaunch.transfer.pull import PullTable
from tests.transfer.fakes import Fabric, FakeClock, layout_of
from tests.transfer.hand_hasher import HandHasher, stated_checksums
from tests.transfer.pull_world import Holder, HolderRank, World
from tests.transfer.rank_process import grant, pull


class SlowHolder:
    """A holder rank whose checksums come when the test says so, asked as the transfer thread does
    it.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.rank = HolderRank(self.clock, Fabric())
        self.hasher = HandHasher(self.rank.kv_cache, self.rank.layout)
        self.holder = Holder(self.rank.card, self.hasher, self.clock)

    def turn(self, *messages: ToPrefillSide) -> list[ToDecodeSide]:
        """Return all answers."""
        return self.holder.ask(*messages)

    def begin(self, lease_id: str = "r") -> PullBegin:
        return PullBegin(
            call_id=1, engine_id="1" * 32, lease_id=lease_id, reader="x", num_decode_ranks=1
        )

    def state(self, lease_id: str = "r") -> StateChecksums:
        return StateChecksums(call_id=3, engine_id="1" * 32, lease_id=lease_id, reader="x")

    def end(self, lease_id: str = "r") -> PullEnd:
        return PullEnd(call_id=2, engine_id="1" * 32, lease_id=lease_id, reader="x")

    def expected(self, block_ids: list[int]) -> bytes:
        return stated_checksums(self.rank.kv_cache, self.rank.layout, block_ids)


@pytest.fixture
def slow() -> SlowHolder:
    return SlowHolder()


def test_readers_begin_at_once_and_wait_for_the_checksums_of_a_lease(slow):
    slow.holder.grant(grant("r", [4, 5]))
    assert slow.holder.polling_since_at == slow.clock.now
    (begun,) = slow.turn(slow.begin(), slow.state())
    assert isinstance(begun, PullReply)
    assert begun.groups[0].checksums is None
    slow.hasher.finish()
    (answer,) = slow.turn()
    assert isinstance(answer, ChecksumsReply)
    assert answer.groups == [slow.expected([4, 5])]
    assert slow.turn() == []
    assert slow.holder.polling_since_at is None


def test_readers_are_answered_before_checksums_are_asked_for(slow):
    """They read meanwhile."""
    num_started = []
    slow.holder._send = lambda *_: num_started.append(len(slow.hasher.started))
    slow.holder.execute(grant("r", [4, 5]))
    slow.turn(slow.begin())
    assert (num_started, len(slow.hasher.started)) == ([0], 1)


def test_checksums_are_those_of_the_moment_of_the_grant(slow):
    expected = slow.expected([4])
    slow.holder.grant(grant("r", [4]))
    slow.rank.kv_cache[4] += 1
    slow.hasher.finish()
    slow.turn(slow.begin())
    (answer,) = slow.turn(slow.state())
    assert answer.groups == [expected]


def test_a_reader_that_gives_up_meanwhile_ends_the_lease(slow):
    slow.holder.grant(grant("r", [4]))
    begun, ended = slow.turn(slow.begin(), slow.state(), slow.end())
    assert isinstance(begun, PullReply)
    assert isinstance(ended, PullEndReply)
    assert ended.held
    assert slow.holder.take_ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    slow.hasher.finish()
    (answer,) = slow.turn()
    assert isinstance(answer, Refused)


def test_checksums_that_do_not_come_are_an_error(slow):
    slow.holder.grant(grant("r", [4]))
    (begun,) = slow.turn(slow.begin(), slow.state())
    assert isinstance(begun, PullReply)
    slow.clock.now += GRANT_LAG_S
    (answer,) = slow.turn()
    assert isinstance(answer, Refused)
    assert "the checksums of request r are not there yet" in answer.reason


class SlowPuller(World):
    """A world whose puller has to wait for its checksums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hasher = HandHasher(self.kv_cache, layout_of())
        self.pulls = PullTable(replace(self.setup, hasher=self.hasher), self.peers)

    def arrive(self, **options: Any) -> HolderRank:
        """A pull whose bytes are here, and nothing is known of them."""
        holder = self.connect()
        holder.holder.grant(grant("r", [4, 5], lease_s=2.0))
        self.pulls.start(replace_struct(pull("p", holder.remote("r"), [1, 2]), **options))
        self.turn()
        assert self.events == []
        assert self.pulls.hashing_since_at == self.clock.now
        return holder


@pytest.fixture
def world() -> SlowPuller:
    return SlowPuller()


def test_a_pull_ends_when_its_checksums_are_there(world):
    holder = world.arrive()
    world.hasher.finish()
    world.turn()
    assert world.finished().ok
    assert world.pulls.hashing_since_at is None
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def parts_of(world: SlowPuller, *ends: int) -> list[Any]:
    """As a device tells them: an event for each part."""
    world.fabric.parts = [(end, object()) for end in ends]  # type: ignore[misc]
    return [event for _, event in world.fabric.parts]


def test_what_lands_is_hashed_while_the_rest_is_under_way(world):
    """Where the device orders that itself, nobody has to look at each part."""
    holder = world.connect()
    holder.holder.grant(grant("r", [4, 5, 6, 7]))
    world.fabric.stalled = True
    events = parts_of(world, 1, 3, 4)
    world.pulls.start(pull("p", holder.remote("r"), [1, 2, 3, 8]))
    world.turn()
    assert [started.after for started in world.hasher.started] == events[1:]
    world.fabric.land()
    world.turn()
    assert [len(started.values) for started in world.hasher.started] == [3, 1]
    for started in world.hasher.started:
        assert world.events == []
        started.is_ready = True
        world.turn()
    assert world.finished().ok
    assert torch.equal(world.kv_cache[[1, 2, 3, 8]], holder.kv_cache[[4, 5, 6, 7]])


def test_wrong_bytes_in_any_part_are_found_and_all_parts_are_read_again(world):
    holder = world.connect()
    holder.holder.grant(grant("r", [4, 5, 6]))
    world.fabric.stalled = True
    parts_of(world, 1, 3)
    world.pulls.start(replace_struct(pull("p", holder.remote("r"), [1, 2, 3]), num_attempts=2))
    world.turn()
    world.fabric.land()
    world.turn()
    world.hasher.started[1].values[1][0] ^= 1
    world.hasher.finish()
    world.fabric.stalled = False
    world.turn()
    assert [len(started.values) for started in world.hasher.started] == [1, 2, 3]
    world.hasher.finish()
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.verification_failed, finished.num_retries) == (True, True, 1)


def test_the_lease_is_kept_meanwhile(world):
    holder = world.arrive()
    for _ in range(9):
        world.clock.now += 0.6
        world.turn()
        assert holder.ended() == []
    world.hasher.finish()
    world.turn()
    assert world.finished().ok


def test_checksums_that_never_come_fail_the_pull(world):
    holder = world.arrive(timeout_s=3.0)
    for _ in range(6):
        world.clock.now += 0.5
        world.turn()
    finished = world.finished()
    assert not finished.ok
    assert not finished.in_flight
    assert "prefill-0/rank-0 is verifying" in finished.error
    assert world.pulls.hashing_since_at is None
    assert len(world.pulls) == 0
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
