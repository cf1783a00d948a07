"""Pulls in one process with fakes (``World``): leases, proofs, and recovery from failures."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    GroupBlocks,
    PullBegin,
    PullHeartbeat,
    PullReply,
)
from pdlaunch.protocol.transfer import CancelPull, LeaseEnded, PullDrained, PullFinished
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher
from pdlaunch.transfer.proof import LATE, UNPROVEN
from pdlaunch.transfer.regions import KVRegions
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, pull

PULLED = [LeaseEnded(lease_id="r", reason="pulled")]


def begin(world: World, *holders: HolderRank, lease_s: float = 60.0, **options: Any) -> None:
    for holder in holders:
        holder.holder.grant(grant("r", [4], lease_s=lease_s))
    world.pulls.start(pull("p", holders[0].remote("r"), [1], **options))
    world.turn()


def land(world: World, turns: int = 4) -> None:
    world.fabric.stalled = False
    world.fabric.land()
    world.turn(turns)


def change(holder: HolderRank, kind: type, **fields: Any) -> None:
    def changed(reply: Any) -> Any:
        return msgspec.structs.replace(reply, **fields) if isinstance(reply, kind) else reply

    holder.channel.change = changed


def test_pull_begins_verifies_and_ends(world, holder):
    holder.holder.grant(grant("r", [4, 5]))
    command = pull("p", holder.remote("r"), [1, 2])
    world.pulls.start(msgspec.structs.replace(command, records_spans=True))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.num_bytes == 2 * holder.layout.block_bytes
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.ended() == PULLED
    assert len(world.pulls) == 0
    assert all(read.released for read in world.fabric.reads)
    (report,) = finished.reports.values()
    read, checksums = report.spans
    assert (read.name, read.attributes["state"], checksums.name) == ("read", "done", "checksums")
    assert read.attributes["bytes"] == finished.num_bytes
    assert checksums.attributes == {"source": "prefill-0/rank-0", "ok": True}
    assert 0 <= read.start_at <= read.end_at <= checksums.end_at <= report.elapsed_s


def test_a_read_past_its_deadline_keeps_its_blocks_until_it_has_landed(world, holder):
    world.fabric.stalled = True
    world.pull_with(pull_timeout_s=3.0)
    begin(world, holder)
    world.clock.now += 3.0
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.in_flight) == (False, True)
    assert "did not end within 3 s; prefill-0/rank-0 is reading" in finished.error
    world.clock.now += 1000
    world.turn()
    assert world.events == []
    # The thread waits only for the READ: a deadline in the past would make it spin.
    assert world.pulls.deadlines() == []
    land(world)
    assert world.events == [PullDrained(pull_id="p")]
    assert len(world.pulls) == 0


def test_a_cancelled_pull_starts_no_read_and_gives_its_share_back(world, holder):
    """Another request may own the blocks when the answer comes."""
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn(1)
    before, num_reads = world.kv_cache[1].clone(), len(world.fabric.reads)
    for _ in range(2):
        world.pulls.cancel(CancelPull(pull_id="p"))
    finished = world.finished()
    assert (finished.ok, finished.in_flight, finished.error) == (False, False, "cancelled")
    assert PullReply in map(type, holder.channel.inbox)
    world.turn()
    assert len(world.fabric.reads) == num_reads
    assert torch.equal(world.kv_cache[1], before)
    assert holder.ended() == PULLED
    assert (world.events, len(world.pulls)) == ([], 0)


def test_only_the_rank_that_brought_wrong_bytes_is_read_again(world):
    """It is read again under the same lease; the other shares of the lease end with the pull."""
    holders = world.connect_group(3)
    world.fabric.stalled = True
    world.pull_with(pull_attempts=2)
    begin(world, *holders)
    right = holders[1].kv_cache[4].clone()
    holders[1].kv_cache[4] += 1
    world.fabric.land()
    holders[1].kv_cache[4] = right
    world.turn()
    assert all(holder.ended() == [] for holder in holders)
    land(world)
    finished = world.finished()
    assert (finished.ok, finished.counts) == (True, {"kv_pull_retries": 1, UNPROVEN: 1})
    assert [len(holder.sent(PullBegin)) for holder in holders] == [1, 2, 1]
    assert torch.equal(world.kv_cache[1], torch.cat([holder.kv_cache[4] for holder in holders]))
    assert all(holder.ended() == PULLED for holder in holders)


@pytest.mark.parametrize("stage", ["beginning", "reading"])
def test_a_pull_outlives_a_new_connection(world, holder, stage):
    """After a failed READ of another pull, this pull repeats its questions and keeps its READs. The
    new connection is made as soon as the last READ of the old connection has ended.
    """
    world.fabric.stalled = True
    if stage == "beginning":
        holder.holder.grant(grant("r", [4]))
        world.pulls.start(pull("p", holder.remote("r"), [1]))
        world.turn(1)
    else:
        begin(world, holder)
    world.peers.peers[holder.identity.name].reconnect()
    world.clock.now += 1.0
    world.turn(1)
    assert len(holder.channels) == (2 if stage == "beginning" else 1)
    land(world, turns=8)
    assert len(holder.channels) == 2
    assert world.finished().ok
    assert holder.ended() == PULLED


def test_a_question_without_an_answer_is_asked_again(world, holder):
    """If both answers arrive, the second answer is ignored."""
    receive, holder.channel.receive = holder.channel.receive, list
    begin(world, holder)
    assert len(holder.sent(PullBegin)) == 1
    world.clock.now = min(world.pulls.deadlines())
    world.turn()
    assert len(holder.sent(PullBegin)) == 2
    holder.channel.receive = receive
    world.turn()
    assert world.finished().ok
    assert len(world.pulls) == 0


@pytest.mark.parametrize("mute", [False, True])
def test_a_lease_that_ends_during_the_read_is_no_proof(world, holder, mute):
    world.fabric.stalled = True
    begin(world, holder, lease_s=2.0)
    holder.channel.mute = mute
    world.clock.now += 1.0
    world.turn()
    world.clock.now += 5.0
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="expired")]
    holder.channel.mute = False
    land(world)
    finished = world.finished()
    assert (finished.ok, LATE in finished.counts) == (False, True)
    assert "the lease may have ended before the READ" in finished.error


# Holders that answer nonsense, or do not exist


def groups(block_ids: list[int], first: int = 0) -> list[GroupBlocks]:
    return [GroupBlocks(first_block_index=first, block_ids=block_ids)]


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        (PullReply, {"groups": []}, "0 KV cache groups there, 1 here"),
        (PullReply, {"groups": groups([4])}, "does not hold all blocks of group 0"),
        (PullReply, {"groups": groups([4, 5], 1)}, "does not hold all blocks of group 0"),
        (PullReply, {"groups": groups([4, 99])}, "a block id is out of range: it has 16 blocks"),
        (PullReply, {"num_tokens": 31}, "token hashes of request r differ"),
        (PullReply, {"block_hashes": []}, "token hashes of request r differ from block 0 on"),
        (ChecksumsReply, {"groups": []}, "sent a wrong number of checksums"),
        (ChecksumsReply, {"groups": [bytes(8)]}, "sent a wrong number of checksums"),
        (ChecksumsReply, {"groups": [bytes(2 * 3 * 8 + 1)]}, "sent a wrong number of checksums"),
        (ChecksumsReply, {"groups": [bytes(2 * 3 * 8)]}, "checksum of KV head 0 differs"),
    ],
)
def test_a_holder_that_states_nonsense_fails_the_pull_only(world, holder, kind, fields, error):
    change(holder, kind, **fields)
    holder.holder.grant(grant("r", [4, 5]))
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert (UNPROVEN in finished.counts) == ("token" in error or "checksum" in error)
    assert error in finished.error
    assert len(world.pulls) == 0


# Checksums that are not ready at once, as on a GPU


class HandChecksums(Checksums):
    """Checksums of the moment of the request; ready when the test says so."""

    is_ready = False

    def ready(self) -> bool:
        return self.is_ready

    def result(self) -> Any:
        assert self.is_ready, "nobody may wait here"
        return super().result()


class HandHasher(KVHasher):
    def __init__(self, kv: KVRegions) -> None:
        super().__init__(kv)
        self.started: list[HandChecksums] = []

    def start(self, block_ids: Any, heads: slice) -> Checksums:
        found = super().start(block_ids, heads).result()
        self.started.append(HandChecksums(lambda: found))
        return self.started[-1]

    def finish(self) -> None:
        for checksums in self.started:
            checksums.is_ready = True


class SlowPuller(World):
    """A world whose puller has to wait for its own checksums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hasher = HandHasher(self.setup.memory.kv)
        self.setup = replace(self.setup, hasher=self.hasher)
        self.pull_with(pull_timeout_s=11.0)


@pytest.mark.parametrize("come", [True, False])
def test_heartbeats_keep_the_lease_of_a_slow_read_and_of_slow_checksums_and_end_with_the_pull(come):
    """A later heartbeat would be refused, and would fail a proven pull."""
    world = SlowPuller()
    holder = world.connect()

    def wait() -> None:
        for _ in range(9):
            world.clock.now += 0.6
            world.turn()
            assert holder.ended() == []

    world.fabric.stalled = True
    begin(world, holder, lease_s=2.0)
    wait()
    land(world)
    assert (world.events, world.pulls.hashing_since()) == ([], [world.clock.now])
    wait()
    if come:
        world.hasher.finish()
    world.clock.now += 0.6
    world.turn()
    finished: PullFinished = world.finished()
    assert (finished.ok, finished.in_flight) == (come, False)
    assert ("prefill-0/rank-0 is verifying" in finished.error) != come
    assert (world.pulls.hashing_since(), len(world.pulls)) == ([], 0)
    assert holder.ended() == PULLED
    num_sent = len(holder.sent(PullHeartbeat))
    world.clock.now += 1.5
    world.turn()
    assert len(holder.sent(PullHeartbeat)) == num_sent
    world.close()
