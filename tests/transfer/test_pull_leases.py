"""The lease of a pull in a World of fakes: kept while it reads, let go of when it ends."""

from __future__ import annotations

from pdlaunch.protocol.side_channel import (
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    PullReply,
    Refused,
)
from pdlaunch.protocol.transfer import (
    CancelPull,
    LeaseEnded,
)
from tests.transfer.rank_process import grant, pull


def test_no_heartbeat_after_the_end(world, holder):
    """It would be refused, and fail a pull that has been proven."""
    holder.holder.grant(grant("r", [4], lease_s=2.0))
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn(2)
    holder.channel.mute = True
    world.turn(2)
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    world.clock.now += 1.5
    world.turn()
    assert holder.sent(PullHeartbeat) == []


def test_heartbeats_keep_the_lease_of_a_slow_read(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=2.0))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    for _ in range(20):
        world.clock.now += 0.6
        world.turn()
        assert holder.ended() == []
    assert len(holder.sent(PullHeartbeat)) >= 18
    world.fabric.land()
    world.turn()
    assert world.finished().ok


def test_a_rank_that_cannot_be_reached_hears_of_the_end_later(world):
    holders = world.connect_group(3)
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("before", holders[0].remote("r"), [1]))
    world.peers.peers[holders[2].identity.name].reconnect()
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="before"))
    finished = world.finished()
    assert (finished.error, finished.in_flight) == ("cancelled", False)
    assert [len(holder.ended()) for holder in holders] == [1, 1, 0]
    assert not world.pulls.hold_blocks
    world.clock.now += 1.0
    world.turn()
    assert holders[2].ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert len(world.pulls) == 0


def test_a_rank_that_stays_out_of_reach_is_not_waited_for_for_ever(world):
    holders = world.connect_group(3)
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holders[0].remote("r"), [1], timeout_s=5.0))
    world.peers.peers[holders[2].identity.name].reconnect()
    world.holders.clear()
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    world.turn()
    assert len(world.pulls) == 1
    assert world.pulls.next_deadline_at() == world.clock.now + 5.0
    world.clock.now += 5.0
    world.turn()
    assert len(world.pulls) == 0


def test_a_begin_that_was_lost_is_sent_again_before_the_end(world, holder):
    """The pull is cancelled while its connection is made anew."""
    holder.holder.grant(grant("r", [4]))
    holder.channel.answer = lambda message: None
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn(1)
    world.peers.peers[holder.identity.name].reconnect()
    world.pulls.cancel(CancelPull(pull_id="p"))
    assert holder.ended() == []
    world.clock.now += 1.0
    world.turn()
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert len(world.pulls) == 0


def test_a_lease_that_ends_during_the_read_is_no_proof(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=2.0))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    world.clock.now += 5.0
    assert [event.reason for event in holder.ended()] == ["expired"]
    world.fabric.land()
    world.turn()
    finished = world.finished()
    assert not finished.ok


def test_end_of_the_lease_before_that_of_the_read(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=2.0))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    holder.channel.mute = True
    world.clock.now += 1.0
    world.turn()
    world.clock.now += 5.0
    holder.channel.mute = False
    world.fabric.land()
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.late
    assert "the lease did not hold throughout the READ" in finished.error


def test_the_seconds_of_a_lease_count_from_the_question_that_they_answer(world, holder):
    """A heartbeat that the holder never got does not make the answer to an older question
    younger.
    """
    holder.holder.grant(grant("r", [4], lease_s=8.0))
    right = holder.kv_cache[4].clone()
    holder.kv_cache[4] += 1
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60, num_attempts=2))
    world.turn()
    world.clock.now += 2.0
    inbox, holder.channel.receive = holder.channel.inbox, list
    world.turn(1)  # a heartbeat
    world.fabric.land()
    world.turn(1)  # wrong bytes: begins anew
    beat, begun = inbox
    assert (type(beat), type(begun)) == (HeartbeatReply, PullReply)
    holder.channel.receive = lambda: [beat]
    world.turn(1)
    world.clock.now += 5.0
    holder.channel.answer, holder.channel.receive = lambda message: None, list
    world.turn(1)  # a heartbeat that is lost
    holder.kv_cache[4] = right
    holder.channel.receive = lambda: [begun]
    world.turn(1)
    world.clock.now += 3.5
    assert [event.reason for event in holder.ended()] == ["expired"]
    holder.channel.receive = list
    world.fabric.land()
    world.turn()
    assert world.finished().late


def test_questions_that_make_no_sense_are_refused_and_change_nothing(holder):
    holder.holder.grant(grant("r", [4]))
    engine_id = holder.identity.engine_id
    asked = {"call_id": 7, "lease_id": "r", "reader": "x"}
    questions = [
        PullBegin(**asked, engine_id="wrong", num_decode_ranks=1),
        PullBegin(**asked | {"lease_id": "unknown"}, engine_id=engine_id, num_decode_ranks=1),
        PullBegin(**asked, engine_id=engine_id, num_decode_ranks=-1),
        PullHeartbeat(**asked, engine_id=engine_id),
        PullEnd(**asked, engine_id="wrong"),
    ]
    for question in questions:
        answer = holder.holder.answer(question)
        assert isinstance(answer, Refused)
        assert answer.call_id == 7
    held = holder.holder.answer(PullEnd(**asked, engine_id=engine_id))
    assert held.held is False
    assert len(holder.holder.leases) == 1
    assert holder.ended() == []
