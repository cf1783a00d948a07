"""Questions that come before the lease that they are about."""

from __future__ import annotations

import pytest

from pdlaunch.protocol.side_channel import (
    PullBegin,
    PullEnd,
    PullHeartbeat,
    PullReply,
    Refused,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import LeaseEnded
from pdlaunch.transfer.leases import GRANT_LAG_S, MAX_WAITING
from tests.transfer.fakes import Fabric, FakeClock
from tests.transfer.pull_world import HolderRank
from tests.transfer.rank_process import grant


class Desk:
    """A holder rank that is asked, as the transfer thread does it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.rank = HolderRank(self.clock, Fabric())

    def ask(self, *messages: ToPrefillSide) -> list[ToDecodeSide]:
        """Send these; all answers that this brings."""
        return self.rank.holder.ask(*messages)

    def begin(self, lease_id: str = "r", engine_id: str = "1" * 32) -> PullBegin:
        return PullBegin(
            call_id=1, engine_id=engine_id, lease_id=lease_id, reader="x", num_decode_ranks=1
        )

    def end(self, lease_id: str = "r") -> PullEnd:
        return PullEnd(call_id=2, engine_id="1" * 32, lease_id=lease_id, reader="x")


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_question_waits_for_its_lease(desk):
    assert desk.ask(desk.begin()) == []
    assert desk.ask() == []
    desk.rank.holder.grant(grant("r", [4]))
    (answer,) = desk.ask()
    assert isinstance(answer, PullReply)
    assert desk.ask() == []


def test_a_pull_that_was_cancelled_before_the_lease_came_still_ends_it(desk):
    """Begin and end are answered in their order: else the lease would live until its deadline."""
    assert desk.ask(desk.begin(), desk.end()) == []
    desk.rank.holder.grant(grant("r", [4]))
    begun, ended = desk.ask()
    assert isinstance(begun, PullReply)
    assert ended.held
    assert desk.rank.ended() == [LeaseEnded(lease_id="r", reason="pulled")]


def test_a_lease_that_does_not_come_is_refused(desk):
    asked_s = desk.clock.now
    desk.ask(desk.begin())
    assert desk.rank.holder.next_deadline_at() == asked_s + GRANT_LAG_S
    desk.clock.now += GRANT_LAG_S
    (answer,) = desk.ask()
    assert isinstance(answer, Refused)
    assert "request r has no lease here" in answer.reason
    assert desk.rank.holder.next_deadline_at() is None


def test_a_lease_that_has_ended_is_refused_at_once(desk):
    desk.rank.holder.grant(grant("r", [4], lease_s=1.0))
    desk.clock.now += 1.0
    assert [event.reason for event in desk.rank.ended()] == ["expired"]
    assert [type(answer) for answer in desk.ask(desk.begin())] == [Refused]


def test_another_engine_is_refused_at_once(desk):
    (answer,) = desk.ask(desk.begin(engine_id="2" * 32))
    assert "belongs to engine_id 1111" in answer.reason


def test_no_more_than_so_many_wait(desk):
    heartbeat = PullHeartbeat(call_id=3, engine_id="1" * 32, lease_id="r", reader="x")
    assert desk.ask(*[heartbeat] * MAX_WAITING) == []
    assert [type(answer) for answer in desk.ask(heartbeat)] == [Refused]
