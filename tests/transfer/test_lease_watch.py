"""Word of leases that are still to come."""

from __future__ import annotations

import pytest

from pdlaunch.protocol.side_channel import AwaitLease, LeaseReply, PullBegin, Refused
from pdlaunch.protocol.transfer import EndLease, LeaseWatched, UnwatchLease, WatchLease
from pdlaunch.transfer.branch import REPEAT_S
from pdlaunch.transfer.early import LONGEST_WAIT_S, MAX_AWAITING
from pdlaunch.transfer.lease_watch import LeaseWatches
from tests.transfer.rank_process import grant, pull
from tests.transfer.test_early import Desk
from tests.transfer.test_pull import HolderRank, World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def watches(world: World) -> LeaseWatches:
    return LeaseWatches(world.peers, world.events.append, world.clock)


def watch(holder: HolderRank, request_id: str = "r") -> WatchLease:
    return WatchLease(request_id="d", remote=holder.remote(request_id))


def test_who_asks_early_is_told_when_the_lease_is_there():
    desk = Desk()
    question = AwaitLease(call_id=1, engine_id="1" * 32, request_id="r")
    assert desk.ask(question) == []
    desk.clock.now += LONGEST_WAIT_S - 1
    assert desk.ask() == []
    desk.rank.holder.grant(grant("r", [4]))
    (answer,) = desk.ask()
    assert isinstance(answer, LeaseReply)
    desk.rank.holder.end(EndLease(request_id="r"))
    (answer,) = desk.ask(question)
    assert isinstance(answer, Refused)


def test_who_waits_too_long_is_refused():
    desk = Desk()
    assert desk.ask(AwaitLease(call_id=1, engine_id="1" * 32, request_id="r")) == []
    desk.clock.now += LONGEST_WAIT_S
    (answer,) = desk.ask()
    assert isinstance(answer, Refused)


def test_a_lease_is_there(world: World, watches: LeaseWatches):
    holder = world.connect()
    lease = grant("r", [4])
    holder.holder.grant(lease)
    watches.start(watch(holder))
    world.turn()
    watches.advance()
    assert world.events == [LeaseWatched(request_id="d", ok=True, first_tokens=lease.first_tokens)]
    world.events.clear()
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert world.finished().ok, "to ask took nobody's share of the lease"


def test_a_lease_is_refused(world: World, watches: LeaseWatches):
    holder = world.connect()
    watches.start(watch(holder))
    world.turn()
    (event,) = world.events
    assert not event.ok
    assert "r has no lease" in event.error


def test_an_unknown_engine_and_one_that_is_not_connected_are_not_waited_for(world: World, watches: LeaseWatches):
    holder = HolderRank(world.clock, world.fabric)
    watches.start(watch(holder))
    (event,) = world.events
    assert not event.ok
    world.events.clear()
    holder = world.add()
    world.peers.update([holder.entry()])
    watches.start(watch(holder))
    watches.advance()
    (event,) = world.events
    assert not event.ok


def test_a_holder_that_is_lost_meanwhile_is_waited_for_no_more(world: World, watches: LeaseWatches):
    holder = world.connect()
    holder.channel.mute = True
    watches.start(watch(holder))
    world.turn()
    watches.advance()
    assert world.events == []
    world.peers.update([])
    world.turn()
    watches.advance()
    (event,) = world.events
    assert not event.ok
    watches.advance()
    assert len(world.events) == 1


def test_who_gets_no_answer_asks_again(world: World, watches: LeaseWatches):
    """The connection broke between two hosts and came back: nobody noticed, the answer went nowhere."""
    holder = world.connect()
    holder.holder.grant(grant("r", [4]))
    holder.channel.mute = True
    watches.start(watch(holder))
    world.turn()
    holder.channel.mute = False
    watches.advance()
    assert len(holder.sent(AwaitLease)) == 1
    assert watches.next_deadline_s() == world.clock.now + REPEAT_S
    world.clock.now += REPEAT_S
    watches.advance()
    world.turn()
    assert [event.ok for event in world.events] == [True]
    world.clock.now += 10 * REPEAT_S
    watches.advance()
    assert len(holder.sent(AwaitLease)) == 2


def test_a_watch_that_is_given_up_asks_no_more(world: World, watches: LeaseWatches):
    holder = world.connect()
    holder.channel.mute = True
    watches.start(watch(holder))
    watches.cancel(UnwatchLease(request_id="d"))
    watches.cancel(UnwatchLease(request_id="d"))
    assert [(event.ok, event.error) for event in world.events] == [(False, "given up")]
    assert watches.next_deadline_s() == float("inf")


def test_an_answer_to_an_older_watch_of_that_name_is_nobodys(world: World, watches: LeaseWatches):
    holder = world.connect()
    holder.holder.grant(grant("r", [4]))
    watches.start(watch(holder))
    answers, holder.channel.inbox = holder.channel.inbox, []
    watches.cancel(UnwatchLease(request_id="d"))
    world.events.clear()
    holder.channel.mute = True
    watches.start(watch(holder, "other"))
    holder.channel.inbox = answers
    world.turn()
    assert world.events == []


def test_those_who_wait_for_word_leave_room_for_pulls():
    desk = Desk()
    for call_id in range(MAX_AWAITING):
        assert desk.ask(AwaitLease(call_id=call_id, engine_id="1" * 32, request_id="r")) == []
    (refused,) = desk.ask(AwaitLease(call_id=1, engine_id="1" * 32, request_id="r"))
    assert isinstance(refused, Refused)
    assert desk.ask(PullBegin(call_id=2, engine_id="1" * 32, request_id="r", reader="x", num_pullers=1)) == []
