"""A holder dies, and its memory outlives it: real Holder, ledger, Peer and Pull over a fake
connector and fake channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from pdlaunch.integrity.checksum import BlockHasher
from pdlaunch.protocol.control import Address, Entry, PairReady
from pdlaunch.protocol.side_channel import PullBegin, PullEnd
from pdlaunch.protocol.transfer import EndLease, PullDrained, SetLeaseReaders
from pdlaunch.transfer.channel.handshake import geometry_of
from pdlaunch.transfer.decode_side.peer_table import new_peer_table
from pdlaunch.transfer.ledger import LedgerRecord, new_ledger, read_ledger
from pdlaunch.transfer.will import LEDGER_FILE, PROCESS_FILE
from tests.transfer.fakes import FakeConnector, layout_of, random_cache
from tests.transfer.hand_hasher import stated_checksums
from tests.transfer.rank_process import grant, pull
from tests.transfer.test_pull import HolderRank, PromptHolder, World, local_memory

AGENT = "prefill-0/rank-0#1"


class MortalRank(HolderRank):
    """A holder whose memory and ledger outlive it. A pipe stands for its process: its write end is
    open while that lives.
    """

    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(world.clock, world.fabric, **options)
        self._ledger, self.ledger_fd = new_ledger()
        self._process_fd, self._life = os.pipe()
        agent = self.holder._card.agent_name
        files = {LEDGER_FILE: self.ledger_fd, PROCESS_FILE: self._process_fd}
        world.fabric.agents[agent] = replace(world.fabric.agents[agent], files=files)
        self.holder = PromptHolder(
            self.holder._card, BlockHasher(self.kv_cache, self.layout), world.clock, self._ledger
        )

    def die(self) -> None:
        """What it has sent already arrives, nothing else."""
        os.close(self._life)
        for channel in self.channels:
            channel.mute = True
            channel.answer = lambda message: None

    def written(self) -> dict[str, LedgerRecord]:
        return {record.grant.request_id: record for record in read_ledger(self.ledger_fd)}

    def close(self) -> None:
        for fd in (self.ledger_fd, self._process_fd, self._life):
            with suppress(OSError):
                os.close(fd)


class ShareRank(MortalRank):
    """One of three ranks of an engine, with a head of its own."""

    def __init__(self, world: World, tp_rank: int) -> None:
        super().__init__(world)
        name = f"prefill-0/rank-{tp_rank}"
        self.identity = replace(self.identity, name=name, tp_rank=tp_rank, tp_size=3)
        self.layout = layout_of(1)
        self.kv_cache = random_cache(self.layout, 16, seed=tp_rank)
        connector = FakeConnector(f"{name}#1", world.fabric)
        files = world.fabric.agents[AGENT].files
        memory = replace(
            local_memory(connector.agent_name, self.kv_cache, self.layout), files=files
        )
        connector.open(memory)
        card = replace(
            self.holder._card,
            identity=self.identity,
            geometry=geometry_of(memory, tp_rank),
            agent_name=connector.agent_name,
            agent_metadata=connector.agent_metadata(),
        )
        self.holder = PromptHolder(
            card, BlockHasher(self.kv_cache, self.layout), world.clock, self._ledger
        )

    def entry(self) -> Entry:
        address = Address(side_channel=f"fake://{self.identity.name}")
        return msgspec.structs.replace(
            super().entry(), tp_rank=self.identity.tp_rank, tp_size=3, address=address
        )


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def holder(world: World) -> Iterator[MortalRank]:
    holder = MortalRank(world)
    world.holders[holder.entry().address.side_channel] = holder
    world.peers.update([holder.entry()])
    world.turn()
    assert isinstance(world.reports[-1], PairReady)
    yield holder
    holder.close()


def registry_drops(world: World, *entries: Entry) -> None:
    world.peers.update(entries)
    world.turn()


def is_mapped(world: World) -> bool:
    return AGENT in world.connector.peers


# The ledger


def test_leases_are_in_the_ledger_for_as_long_as_they_live(holder):
    holder.holder.grant(grant("a", [4, 5], num_readers=3))
    holder.holder.grant(grant("b", [6]))
    assert holder.written().keys() == {"a", "b"}
    assert holder.written()["a"].num_readers == 3
    assert holder.written()["a"].groups[0].checksums == stated_checksums(
        holder.kv_cache, holder.layout, [4, 5]
    )
    holder.holder.set_readers(SetLeaseReaders(request_id="a", num_readers=2))
    assert holder.written()["a"].num_readers == 2
    holder.holder.end(EndLease(request_id="b"))
    # The engine has not heard of the end: nobody has touched the block yet.
    assert holder.written().keys() == {"a", "b"}
    assert [event.request_id for event in holder.ended()] == ["b"]
    assert holder.written().keys() == {"a"}


def test_the_ledger_counts_down_the_readers(holder):
    holder.holder.grant(grant("a", [4], num_readers=2))
    for reader in ("half-1", "half-2"):
        assert holder.written()["a"].num_readers == 2
        answer(holder, reader, num_pullers=2)
    assert holder.written()["a"].num_readers == 1
    answer(holder, "whole", num_pullers=1)
    assert holder.ended()[0].reason == "pulled"
    assert holder.written() == {}


def answer(holder: MortalRank, reader: str, *, num_pullers: int) -> None:
    engine_id = holder.identity.engine_id
    holder.holder.answer(
        PullBegin(
            call_id=1, engine_id=engine_id, request_id="a", reader=reader, num_pullers=num_pullers
        )
    )
    holder.holder.answer(PullEnd(call_id=2, engine_id=engine_id, request_id="a", reader=reader))


# Pulls of what is left


@pytest.mark.parametrize("known", ["before the pull", "after the pull was asked for"])
def test_a_pull_after_the_death_needs_no_living(world, holder, known):
    holder.holder.grant(grant("r", [4, 5]))
    holder.die()
    if known == "before the pull":
        registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    registry_drops(world)
    finished = world.finished()
    assert finished.ok, finished.error
    assert finished.departed
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert not is_mapped(world)
    assert world.peers.all() == []


def test_an_answer_of_the_dead_is_due_at_once(world, holder):
    """No socket wakes the loop for it."""
    holder.holder.grant(grant("r", [4]))
    holder.die()
    registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn(1)
    (peer,) = world.peers.all()
    assert peer.next_deadline_s() == world.clock.now
    world.turn(1)
    world.turn(1)
    assert world.finished().ok


def test_a_read_that_was_under_way_goes_on(world, holder):
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    holder.die()
    registry_drops(world)
    world.clock.now += 8  # a heartbeat is due
    world.turn()
    assert world.events == []
    assert is_mapped(world)
    world.fabric.land()
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.departed) == (True, True)
    assert not is_mapped(world)


def test_a_holder_that_dies_after_the_read_is_told_of_the_end_through_its_ledger(world, holder):
    """Its memory goes with the last of its leases."""
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn(1)
    holder.die()
    world.turn()
    assert world.finished().ok
    assert isinstance(holder.channel.sent[-1], PullEnd)
    assert is_mapped(world)
    registry_drops(world)
    assert not is_mapped(world)


def test_a_lease_that_had_ended_before_the_death_proves_nothing(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=2))
    holder.holder.grant(grant("other", [5], lease_s=100))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    holder.channel.mute = True
    world.clock.now += 5
    assert holder.ended()[0].reason == "expired"
    holder.die()
    registry_drops(world)
    world.fabric.land()
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert world.events == [PullDrained(pull_id="p")]
    world.events.clear()
    world.pulls.start(pull("late", holder.remote("r"), [1]))
    world.turn()
    assert "prefill-0/rank-0 has died; request r has no lease here" in world.finished().error


def test_bytes_that_changed_in_dead_memory_are_found(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.die()
    holder.kv_cache[4, 1, 0, 0, 0, 0] += 1
    registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1], num_attempts=2))
    world.turn(6)
    finished = world.finished()
    assert (finished.ok, finished.verification_failed, finished.num_retries) == (False, True, 1)
    assert not is_mapped(world)


def test_another_prompt_is_refused_as_ever(world, holder):
    holder.holder.grant(grant("r", [4], salt="x"))
    holder.die()
    registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1], salt="y"))
    world.turn()
    assert "token hashes of request r differ" in world.finished().error


def test_a_failed_read_is_repeated_and_leaves_the_others_their_memory(world, holder):
    for name in ("r", "s", "t"):
        holder.holder.grant(grant(name, [4]))
    holder.die()
    registry_drops(world)
    world.fabric.failing = True
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert not world.finished().ok
    world.pulls.start(pull("q", holder.remote("s"), [1], num_attempts=2))
    world.turn(1)
    world.turn(1)
    world.fabric.failing = False
    world.turn()
    finished = world.finished()
    assert (finished.ok, finished.num_retries) == (True, 1)
    assert is_mapped(world)
    world.pulls.start(pull("t", holder.remote("t"), [1]))
    world.turn()
    assert world.finished().ok
    assert not is_mapped(world)


# When the memory goes


def test_memory_stays_until_every_reader_has_been_here(world, holder):
    holder.holder.grant(grant("r", [4], num_readers=2))
    holder.holder.grant(grant("s", [5]))
    holder.die()
    registry_drops(world)
    for name in ("r", "s", "r"):
        assert is_mapped(world)
        world.pulls.start(
            pull(f"{name}{len(holder.channels)}{world.clock.now}", holder.remote(name), [1])
        )
        world.clock.now += 1
        world.turn()
        assert world.finished().ok
    assert not is_mapped(world)


def test_memory_goes_when_nobody_comes(world, holder):
    holder.holder.grant(grant("r", [4], lease_s=10))
    holder.die()
    registry_drops(world)
    (peer,) = world.peers.all()
    assert peer.next_deadline_s() == world.clock.now + 10
    world.clock.now += 9
    world.turn()
    assert is_mapped(world)
    world.clock.now += 1
    world.turn()
    assert not is_mapped(world)
    assert peer.next_deadline_s() == float("inf")
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    assert "no engine with engine_id 1111" in world.finished().error


def test_memory_of_ranks_that_others_read_goes_at_once(world):
    """Three ranks pull from three: each from the one with its head, though all have shaken
    hands.
    """
    setup = world.peers.setup
    world.peers = new_peer_table(
        replace(setup, identity=replace(setup.identity, tp_rank=1, tp_size=3)), eager=True
    )
    holders = [ShareRank(world, tp_rank) for tp_rank in range(3)]
    world.holders.update({holder.entry().address.side_channel: holder for holder in holders})
    world.peers.update([holder.entry() for holder in holders])
    world.turn()
    assert len(world.connector.peers) == 3
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
        holder.die()
    registry_drops(world)
    assert world.connector.peers == ["prefill-0/rank-1#1"]
    for holder in holders:
        holder.close()


def test_memory_goes_at_once_when_there_is_no_lease(world, holder):
    holder.die()
    registry_drops(world)
    assert not is_mapped(world)


def test_a_successor_on_a_device_gets_the_memory_but_not_that_of_a_pull_that_has_begun(
    world, holder
):
    world.peers = replace(world.peers, gives_way=True)
    world.pulls._peers = world.peers
    holder.holder.grant(grant("r", [4]))
    holder.holder.grant(grant("s", [5]))
    holder.die()
    registry_drops(world)
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    successor = Entry(
        name=holder.identity.name, kind="rank", incarnation=2, engine="prefill-0", role="prefill"
    )
    registry_drops(world, successor)
    world.pulls.start(pull("q", holder.remote("s"), [2]))
    world.turn()
    assert "request s has no lease here" in world.finished().error
    assert is_mapped(world)
    world.fabric.land()
    world.turn()
    assert world.finished().ok
    assert not is_mapped(world)


def test_the_successor_is_a_peer_of_its_own_meanwhile(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.die()
    registry_drops(world)
    new = world.add(incarnation=2)
    registry_drops(world, new.entry())
    new.holder.grant(grant("r", [6]))
    for pull_id, remote in (("old", holder.remote("r")), ("new", new.remote("r"))):
        world.pulls.start(pull(pull_id, remote, [1]))
        world.turn()
        assert world.finished().ok
    assert torch.equal(world.kv_cache[1], new.kv_cache[6])
    assert world.connector.peers == ["prefill-0/rank-0#2"]


# What is no death


def test_nothing_is_read_before_the_process_is_dead(world, holder):
    """The supervisor kills the other ranks of an engine when one has died: they leave the registry
    a moment before their end.
    """
    holder.holder.grant(grant("r", [4]))
    registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert world.events == []
    (peer,) = world.peers.all()
    assert peer.channel.socket is not None  # The loop wakes up at the death.
    holder.die()
    world.turn()
    assert world.finished().ok


def test_a_process_that_does_not_die_is_lost(world, holder):
    holder.holder.grant(grant("r", [4]))
    registry_drops(world)
    world.pulls.start(pull("p", holder.remote("r"), [1], timeout_s=60))
    world.turn()
    world.clock.now += 5.0
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert not is_mapped(world)


def test_a_sleeping_holder_has_no_memory(world, holder):
    holder.holder.grant(grant("r", [4]))
    entry = holder.entry()
    entry.state = "sleeping"
    registry_drops(world, entry)
    assert not is_mapped(world)


def test_this_rank_falls_asleep(world, holder):
    holder.holder.grant(grant("r", [4]))
    holder.die()
    registry_drops(world)
    assert is_mapped(world)
    world.peers.lose_all("this engine falls asleep")
    assert not is_mapped(world)


def test_memory_that_dies_with_its_owner_is_lost(world):
    holder = world.connect()
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    registry_drops(world)
    assert "incarnation 1 of prefill-0/rank-0 is gone" in world.finished().error
    world.fabric.kill()
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]
