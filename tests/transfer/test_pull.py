"""Handshake, pull and recovery in one process: real LeaseAnswers, Peer and Pull over a fake connector and
fake channels.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pdlaunch.integrity.checksum import KVHasher
from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.protocol.control import Address, Entry, PairFailed, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import (
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullEndReply,
    PullHeartbeat,
    PullReply,
    Refused,
)
from pdlaunch.protocol.transfer import (
    CancelPull,
    EndLease,
    GrantLease,
    LeaseEnded,
    PullDrained,
    PullFinished,
    TransferEvent,
)
from pdlaunch.transfer.channel.handshake import RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.connectors.connector import LocalMemory
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES, SCRATCH_BYTES, scratch_pattern
from pdlaunch.transfer.decode_side.links import PeerSetup, PullSetup
from pdlaunch.transfer.decode_side.peer_table import PeerTable, new_peer_table
from pdlaunch.transfer.decode_side.pull import PullTable
from pdlaunch.transfer.prefill_side.answers import LeaseAnswers, RankCard
from tests.transfer.fakes import (
    Fabric,
    FakeChannel,
    FakeClock,
    FakeConnector,
    layout_of,
    random_cache,
    spec_of,
)
from tests.transfer.rank_process import grant, pull


class PromptHolder(LeaseAnswers):
    """Has the checksums at once, as the transfer thread has them by its next turn."""

    def grant(self, command: GrantLease) -> None:
        super().grant(command)
        self.advance_checksums()


class HolderRank:
    """A prefill rank without thread and sockets."""

    def __init__(
        self,
        clock: FakeClock,
        fabric: Fabric,
        *,
        incarnation: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        **spec: Any,
    ) -> None:
        self.layout = layout_of(3 // tp_size, block_size=spec.get("block_size", 16))
        self.kv_cache = random_cache(self.layout, 16, seed=incarnation + tp_rank)
        name = f"prefill-0/rank-{tp_rank}"
        self.identity = RankIdentity(
            name, "prefill-0", f"{incarnation}" * 32, incarnation, tp_rank, tp_size
        )
        connector = FakeConnector(f"{name}#{incarnation}", fabric)
        memory = local_memory(connector.agent_name, self.kv_cache, self.layout)
        connector.open(memory)
        compatibility = compatibility_of(
            spec_of(**spec),
            self.layout,
            torch.float32,
            model_digest="m",
            total_kv_heads=3,
            connector="fake",
        )
        card = RankCard(
            self.identity,
            compatibility,
            geometry_of(memory, tp_rank),
            connector.agent_name,
            connector.agent_metadata(),
        )
        hasher = KVHasher(self.kv_cache, self.layout) if spec.get("verify", True) else None
        self.holder = PromptHolder(card, hasher, clock)
        self.channels: list[FakeChannel] = []

    @property
    def channel(self) -> FakeChannel:
        """The newest connection to this rank."""
        return self.channels[-1]

    def entry(self) -> Entry:
        return Entry(
            name=self.identity.name,
            kind="rank",
            incarnation=self.identity.incarnation,
            engine=self.identity.engine,
            role="prefill",
            tp_rank=self.identity.tp_rank,
            tp_size=self.identity.tp_size,
            engine_id=self.identity.engine_id,
            address=Address(
                side_channel=f"fake://{self.identity.incarnation + 10 * self.identity.tp_rank}"
            ),
        )

    def remote(self, lease_id: str) -> RemoteKV:
        return RemoteKV(
            engine_id=self.identity.engine_id,
            lease_id=lease_id,
            host="h",
            port=1,
            block_ids=[],
            num_tokens=1,
        )

    def ended(self) -> list[LeaseEnded]:
        return self.holder.take_ended()

    def sent(self, kind: type) -> list[Any]:
        return [
            message
            for channel in self.channels
            for message in channel.sent
            if isinstance(message, kind)
        ]


def local_memory(agent_name: str, kv_cache: torch.Tensor, layout: KVCacheLayout) -> LocalMemory:
    """The rows of its scratch, [16, PATTERN_BYTES], share their memory: all are equal, and nobody
    writes to them.
    """
    row = torch.frombuffer(bytearray(scratch_pattern(agent_name, PATTERN_BYTES)), dtype=torch.uint8)
    return LocalMemory(kv_cache, row.expand(SCRATCH_BYTES // PATTERN_BYTES, PATTERN_BYTES), layout)


@dataclass
class World:
    """One puller rank and the holders that it can reach."""

    clock: FakeClock = field(default_factory=FakeClock)
    fabric: Fabric = field(default_factory=Fabric)
    holders: dict[str, HolderRank] = field(default_factory=dict)
    events: list[TransferEvent] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    eager: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        layout = layout_of()
        self.kv_cache = random_cache(layout, 16, seed=99)
        self.connector = FakeConnector("decode-0/rank-0#1", self.fabric)
        self.connector.open(local_memory(self.connector.agent_name, self.kv_cache, layout))
        weak = weakref.proxy(
            self
        )  # peers that refer to the world would be a cycle, which keeps its tensors
        setup = PeerSetup(
            identity=RankIdentity("decode-0/rank-0", "decode-0", "d" * 32, 1, 0, 1),
            compatibility=compatibility_of(
                spec_of("decode", verify=self.verify),
                layout,
                torch.float32,
                model_digest="m",
                total_kv_heads=3,
                connector="fake",
            ),
            head_bytes=layout.head_bytes,
            connector=self.connector,
            open_channel=lambda endpoint: weak.open_channel(endpoint),
            handshake_timeout_s=5.0,
            clock=self.clock,
            report=self.reports.append,
        )
        self.peers: PeerTable = new_peer_table(setup, eager=self.eager)
        hasher = KVHasher(self.kv_cache, layout) if self.verify else None
        puller = PullSetup(
            "d" * 32,
            0,
            0,
            layout.head_bytes,
            hasher,
            self.clock,
            self.events.append,
            lambda _: None,
        )
        self.pulls = PullTable(puller, self.peers)

    def close(self) -> None:
        """Let go of what was asked and has no answer."""
        self.peers.lose_all("the world is closed")

    def open_channel(self, endpoint: str) -> FakeChannel:
        holder = self.holders.get(endpoint)
        if holder is None:
            return FakeChannel(lambda message: None)
        holder.channels.append(FakeChannel(holder.holder.answer))
        return holder.channel

    def add(self, **options: Any) -> HolderRank:
        holder = HolderRank(self.clock, self.fabric, verify=self.verify, **options)
        self.holders[holder.entry().address.side_channel] = holder
        return holder

    def turn(self, times: int = 4) -> None:
        for _ in range(times):
            self.peers.advance()
            self.pulls.advance()

    def connect(self, **options: Any) -> HolderRank:
        holder = self.add(**options)
        self.peers.update([holder.entry()])
        self.turn()
        assert isinstance(self.reports[-1], PairReady)
        return holder

    def connect_group(self, tp_size: int) -> list[HolderRank]:
        """All ranks of a holder with tensor parallelism."""
        holders = [self.add(tp_rank=tp_rank, tp_size=tp_size) for tp_rank in range(tp_size)]
        self.peers.update([holder.entry() for holder in holders])
        self.turn()
        assert [type(report) for report in self.reports[-tp_size:]] == [PairReady] * tp_size
        return holders

    def finished(self) -> PullFinished:
        event = self.events.pop(0)
        assert isinstance(event, PullFinished)
        return event


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def holder(world: World) -> HolderRank:
    return world.connect()


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


def test_handshake_happens_at_the_first_pull_when_it_is_not_asked_for_before():
    world = World(eager=False)
    holder = world.add()
    world.peers.update([holder.entry()])
    world.turn()
    assert holder.channels == []
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert world.finished().ok


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


def test_nothing_is_due_while_a_read_that_was_given_up_goes_on(world, holder):
    """Else the transfer thread would turn without a pause, for as long as the READ is stalled."""
    holder.holder.grant(grant("r", [4], lease_s=2.0))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    assert world.finished().in_flight
    world.clock.now += 1.0
    world.turn()
    assert world.pulls.next_deadline_at() > world.clock.now
    world.fabric.land()
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]


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


def test_cancel_before_the_begin_frees_the_share_too(world, holder):
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.pulls.cancel(CancelPull(pull_id="p"))
    assert world.finished().error == "cancelled"
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    world.turn()
    assert not torch.equal(world.kv_cache[1], holder.kv_cache[4])


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


def test_wrong_bytes_are_named_after_the_last_attempt(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.kv_cache[4, 1, 0, 0, 0, 0] += 1
    world.pulls.start(pull("p", holder.remote("r"), [1], num_attempts=3))
    world.turn(8)
    finished = world.finished()
    assert (finished.ok, finished.verification_failed, finished.num_retries) == (False, True, 2)
    assert "KV head 1 differs: block 4 there, block 1 here" in finished.error
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


def test_the_last_attempt_leaves_no_lease_behind(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.kv_cache[4] += 1
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert world.finished().verification_failed
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]


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


def test_a_pull_ends_without_a_question(world, holder):
    """The READ is over before the lease can be: the holder is told, and need not answer."""
    holder.holder.grant(grant("r", [4]))
    answer = holder.channel.answer
    holder.channel.answer = lambda message: (
        None if isinstance(message, PullEnd) else answer(message)
    )
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    assert world.finished().ok
    assert len(world.pulls) == 0
    assert isinstance(holder.channel.sent[-1], PullEnd)


def test_the_holder_of_a_finished_pull_hears_of_it_over_the_next_connection(world):
    """Another pull's READ has failed when this one ends."""
    holders = world.connect_group(3)
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holders[0].remote("r"), [1], timeout_s=60))
    world.turn()
    world.peers.peers[holders[2].identity.name].reconnect()
    world.fabric.stalled = False
    world.fabric.land()
    world.turn(2)
    assert world.finished().ok
    assert len(world.pulls) == 1
    assert not world.pulls.hold_blocks
    world.clock.now += 1.0
    world.turn(6)
    assert [holder.ended() for holder in holders] == [
        [LeaseEnded(lease_id="r", reason="pulled")]
    ] * 3
    assert len(world.pulls) == 0


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


def test_an_unreachable_holder_is_tried_again_with_growing_pauses(world):
    absent = HolderRank(world.clock, world.fabric)
    world.peers.update([absent.entry()])
    pauses = []
    for failures in range(1, 6):
        while len(world.reports) < failures:
            world.clock.now += 0.125
            world.turn(1)
        pauses.append(world.clock.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(pauses)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > gaps[0]
    assert not any(report.fatal for report in world.reports)
    assert (
        "no answer to the handshake from prefill-0/rank-0 at fake://1 within 5 s"
        in world.reports[0].error
    )
    world.holders["fake://1"] = absent
    world.clock.now += 20
    world.turn()
    world.clock.now += 20
    world.turn()
    assert isinstance(world.reports[-1], PairReady)


def test_incompatible_engines_are_final_until_a_restart(world):
    holder = world.add(block_size=32, dtype="bfloat16")
    world.peers.update([holder.entry()])
    world.turn()
    (failed,) = world.reports
    assert isinstance(failed, PairFailed)
    assert failed.fatal
    assert "dtype: decode-0/rank-0 has 'float32', prefill-0/rank-0 has 'bfloat16'" in failed.error
    assert "block_size: decode-0/rank-0 has 16, prefill-0/rank-0 has 32" in failed.error
    world.clock.now += 100
    world.turn()
    assert len(world.reports) == 1
    new = world.add(incarnation=2)
    world.peers.update([new.entry()])
    world.turn()
    assert isinstance(world.reports[-1], PairReady)


def test_wrong_bytes_in_the_first_read_fail_the_handshake(world):
    holder = world.add()
    world.fabric.agents["prefill-0/rank-0#1"].scratch[7] ^= 1
    world.peers.update([holder.entry()])
    world.turn()
    assert (
        "prefill-0/rank-0 cannot be read: the first READ brought wrong bytes"
        in world.reports[-1].error
    )
    assert not world.reports[-1].fatal
    assert world.connector.peers == []


def test_a_handshake_is_not_repeated_while_its_read_may_still_write(world):
    holder = world.add()
    world.fabric.stalled = True
    world.peers.update([holder.entry()])
    for _ in range(10):
        world.turn()
        world.clock.now += 5.0
    assert "no answer to the first READ" in world.reports[0].error
    assert world.connector.added == ["prefill-0/rank-0#1"]
    world.fabric.stalled = False
    world.fabric.land()
    for _ in range(2):
        world.turn()
        world.clock.now += 5.0
    world.turn()
    assert isinstance(world.reports[-1], PairReady)
    assert world.connector.added == ["prefill-0/rank-0#1"] * 2
    assert world.connector.peers == ["prefill-0/rank-0#1"]


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


def test_a_holder_with_another_engine_id_than_the_registry_is_not_used(world):
    holder = world.add()
    entry = holder.entry()
    world.peers.update(
        [
            Entry(
                **{name: getattr(entry, name) for name in entry.__struct_fields__}
                | {"engine_id": "f" * 32}
            )
        ]
    )
    world.turn()
    assert "belongs to engine_id 1111" in world.reports[-1].error
    assert f"not to {'f' * 32}" in world.reports[-1].error


def test_ranks_of_one_engine_must_share_an_engine_id(world):
    entries = [
        Entry(
            name=f"prefill-0/rank-{tp_rank}",
            kind="rank",
            incarnation=1,
            engine="prefill-0",
            role="prefill",
            tp_rank=tp_rank,
            tp_size=2,
            engine_id=f"{tp_rank}" * 32,
            address=Address(side_channel=f"tcp://h{tp_rank}:1"),
        )
        for tp_rank in range(2)
    ]
    world.peers.update(entries)
    (failed,) = world.reports
    assert failed.fatal
    for part in (
        "prefill-0/rank-0 at tcp://h0:1",
        "0" * 32,
        "prefill-0/rank-1 at tcp://h1:1",
        "1" * 32,
    ):
        assert part in failed.error


def test_end_of_a_lease_without_a_pull(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.holder.end(EndLease(lease_id="r"))
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="released")]
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert "refused" in finished.error


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
    assert holder.holder.num_leases == 1
    assert holder.ended() == []
