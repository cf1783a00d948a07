"""Pull and recovery in one process, in a World of fakes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    PullBegin,
    PullEndReply,
    PullReply,
)
from pdlaunch.protocol.transfer import (
    CancelPull,
    LeaseEnded,
    PullDrained,
)
from tests.transfer.pull_world import HolderRank
from tests.transfer.rank_process import grant, pull


def test_pull_begins_verifies_and_ends(world, holder):
    holder.holder.grant(grant("r", [4, 5]))
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.num_bytes == 2 * holder.layout.block_bytes
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert len(world.pulls) == 0
    assert all(read.released for read in world.fabric.reads)


def test_a_read_past_its_deadline_keeps_its_blocks_until_it_has_landed(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=100))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=3.0))
    world.turn()
    world.clock.now += 3.0
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.in_flight) == (False, True)
    assert "no end within 3 s; prefill-0/rank-0 is reading" in finished.error
    world.clock.now += 1000
    world.turn()
    assert world.events == []
    world.fabric.land()
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]
    assert len(world.pulls) == 0


def test_cancel_before_the_answer_frees_the_share(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.channel.mute = True
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    finished = world.finished()
    assert (finished.ok, finished.in_flight, finished.error) == (False, False, "cancelled")
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    world.pulls.cancel(CancelPull(pull_id="p"))
    world.turn()
    assert world.events == []


def test_an_answer_that_comes_after_the_end_starts_no_read(world, holder):
    """The blocks may be somebody else's by then."""
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn(1)
    before, num_reads = world.kv_cache[1].clone(), len(world.fabric.reads)
    world.pulls.cancel(CancelPull(pull_id="p"))
    assert not world.finished().in_flight
    assert [type(message) for message in holder.channel.inbox] == [PullReply, PullEndReply]
    world.turn()
    assert len(world.fabric.reads) == num_reads
    assert torch.equal(world.kv_cache[1], before)
    assert len(world.pulls) == 0


def test_wrong_bytes_are_pulled_again_under_the_same_lease(world, holder):
    holder.holder.grant(grant("r", [4]))
    right = holder.kv_cache[4].clone()
    holder.kv_cache[4, 1, 0, 0, 0, 0] += 1
    world.pulls.start(pull("p", holder.remote("r"), [1], num_attempts=2))
    world.turn(2)
    assert world.events == []
    assert holder.ended() == []
    holder.kv_cache[4] = right
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.num_retries, finished.verification_failed) == (True, 1, True)
    assert finished.num_bytes == holder.layout.block_bytes
    assert torch.equal(world.kv_cache[1], right)
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]


def test_only_the_rank_that_brought_wrong_bytes_is_read_again(world):
    """The others' shares of the lease end with the pull, not before."""
    holders = world.connect_group(3)
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
    right = holders[1].kv_cache[4].clone()
    holders[1].kv_cache[4] += 1
    world.pulls.start(pull("p", holders[0].remote("r"), [1], num_attempts=2))
    world.turn(2)
    holders[1].kv_cache[4] = right
    assert all(holder.ended() == [] for holder in holders)
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.num_retries) == (True, 1)
    assert [len(holder.sent(PullBegin)) for holder in holders] == [1, 2, 1]
    assert torch.equal(world.kv_cache[1], torch.cat([holder.kv_cache[4] for holder in holders]))
    assert all(holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")] for holder in holders)


def test_a_new_connection_is_made_as_soon_as_the_last_read_of_the_old_one_is_over(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=100))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    world.peers.peers[holder.identity.name].reconnect()
    world.clock.now += 1.0
    world.turn()
    assert len(holder.channels) == 1
    world.fabric.stalled = False
    world.fabric.land()
    world.turn()
    assert len(holder.channels) == 2
    assert world.finished().ok


@pytest.mark.parametrize("stage", ["beginning", "reading"])
def test_a_pull_outlives_a_new_connection(world, holder, stage):
    """Another pull's READ has failed: what this one has asked is asked again, what it has read is
    kept.
    """
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = stage == "reading"
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    if stage == "beginning":
        world.turn(1)
    else:
        world.turn()
    assert world.events == []
    world.peers.peers[holder.identity.name].reconnect()
    world.turn(1)
    world.fabric.stalled = False
    world.fabric.land()
    world.turn()
    world.clock.now += 1.0
    world.turn(6)
    assert world.finished().ok
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert len(holder.channels) == 2


def test_a_begin_without_an_answer_is_asked_again(world, holder):
    """Both answers may come in the end: the second one says nothing new."""
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    receive, holder.channel.receive = holder.channel.receive, list
    world.turn()
    assert len(holder.sent(PullBegin)) == 1
    world.clock.now = world.pulls.next_deadline_at()
    world.turn()
    assert len(holder.sent(PullBegin)) == 2
    holder.channel.receive = receive
    world.turn()
    world.fabric.land()
    world.turn()
    assert world.finished().ok
    assert len(world.pulls) == 0


def test_a_failed_read_reconnects(world, holder):
    holder.holder.grant(grant("r", [4]))
    world.fabric.failing = True
    world.pulls.start(pull("p", holder.remote("r"), [1], num_attempts=2))
    world.turn()
    assert world.events == []
    assert world.connector.peers == []
    world.fabric.failing = False
    world.clock.now += 1.0
    world.turn(6)
    finished = world.finished()
    assert (finished.ok, finished.num_retries) == (True, 1)
    assert world.connector.added == ["prefill-0/rank-0#1"] * 2


def test_a_restarted_holder_fails_its_pulls_and_keeps_the_old_agent_only_for_a_stalled_read(
    world, holder
):
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    new = world.add(incarnation=2)
    world.peers.update([new.entry()])
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.in_flight) == (False, True)
    assert "incarnation 1 of prefill-0/rank-0 is gone" in finished.error
    assert holder.channel.closed
    assert "prefill-0/rank-0#1" in world.connector.peers
    world.fabric.kill()
    world.fabric.stalled = False
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]
    assert "prefill-0/rank-0#1" not in world.connector.peers
    world.clock.now += 1.0
    world.turn()
    new.holder.grant(grant("r", [4]))
    world.events.clear()
    world.pulls.start(pull("p2", new.remote("r"), [1]))
    world.turn()
    assert world.finished().ok
    world.pulls.start(pull("p3", holder.remote("r"), [1]))
    assert "no engine with engine_id 1111" in world.finished().error


def test_groups_without_blocks_to_pull_are_skipped(world, holder):
    """A sliding window may have left every block that the holder still has, or all may be
    cached.
    """
    granted = grant("r", [4, 5])
    granted.block_ids.append([6])
    granted.first_block_index.append(1)
    holder.holder.grant(granted)
    command = pull("p", holder.remote("r"), [1, 2])
    command.block_ids.append([])
    command.first_block_index.append(0)
    world.pulls.start(command)
    world.turn()
    assert world.finished().ok


def lying(holder: HolderRank, **changes: Any) -> None:
    """From now on the holder's PullReply has other contents."""
    answer = holder.channel.answer

    def changed(message: Any) -> Any:
        reply = answer(message)
        if isinstance(reply, PullReply):
            for name, value in changes.items():
                setattr(reply, name, value)
        return reply

    holder.channel.answer = changed


def group(block_ids: list[int], first: int = 0, checksums: Any = None) -> Any:
    from pdlaunch.protocol.side_channel import GroupBlocks

    return GroupBlocks(first_block_index=first, block_ids=block_ids, checksums=checksums)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"groups": []}, "0 KV cache groups, 1 here"),
        ({"groups": [group([4])]}, "does not hold all blocks of group 0 from 0 on"),
        ({"groups": [group([4, 5], first=1)]}, "does not hold all blocks of group 0 from 0 on"),
        ({"groups": [group([4, 99])]}, "named a block outside of its 16"),
        ({"groups": [group([4, 5], checksums=bytes(8))]}, "the prefill rank stated no checksums"),
        (
            {"groups": [group([4, 5], checksums=bytes(2 * 3 * 8 + 1))]},
            "the prefill rank stated no checksums",
        ),
        ({"groups": [group([4, 5], checksums=bytes(2 * 3 * 8))]}, "checksum of KV head 0 differs"),
        ({"num_tokens": 31}, "token hashes of request r differ"),
        ({"block_hashes": []}, "token hashes of request r differ from block 0 on"),
    ],
)
def test_a_holder_that_states_nonsense_fails_the_pull_only(world, holder, changes, error):
    holder.holder.grant(grant("r", [4, 5]))
    lying(holder, **changes)
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert error in finished.error
    assert len(world.pulls) == 0


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([], "stated no checksums"),
        ([None], "stated no checksums"),
        ([bytes(8)], "stated no checksums"),
        ([bytes(48)], "differs"),
    ],
)
def test_checksums_that_make_no_sense_fail_the_pull(world, holder, groups, error):
    answer = holder.channel.answer

    def changed(message: Any) -> Any:
        reply = answer(message)
        if isinstance(reply, PullReply):
            reply.groups[0] = msgspec.structs.replace(reply.groups[0], checksums=None)
        if isinstance(reply, ChecksumsReply):
            reply.groups = groups
        return reply

    holder.channel.answer = changed
    holder.holder.grant(grant("r", [4, 5]))
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.verification_failed
    assert error in finished.error
