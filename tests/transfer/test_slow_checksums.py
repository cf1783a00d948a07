"""Checksums that take their time, as on a GPU: nobody waits for them, nobody goes on without them."""

from __future__ import annotations

import pytest

from pdlaunch.protocol.side_channel import PullBegin, PullEnd, PullEndReply, PullReply, Refused, ToHolder, ToPuller
from pdlaunch.protocol.transfer import EndLease, LeaseEnded, SetLeaseReaders
from pdlaunch.transfer.checksum import BlockHasher
from pdlaunch.transfer.early import GRANT_LAG_S, EarlyQuestions
from pdlaunch.transfer.holder import Holder
from pdlaunch.transfer.ledger import new_ledger, read_ledger
from tests.transfer.fakes import Fabric, FakeClock
from tests.transfer.hand_hasher import HandHasher
from tests.transfer.rank_process import grant
from tests.transfer.test_pull import HolderRank


class SlowHolder:
    """A holder rank whose checksums come when the test says so, asked as the transfer thread does it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.rank = HolderRank(self.clock, Fabric())
        self.hasher = HandHasher(self.rank.kv_cache, self.rank.layout)
        ledger, self.ledger_fd = new_ledger()
        self.holder = Holder(self.rank.holder._card, self.hasher, self.clock, ledger)
        self.early = EarlyQuestions(self.holder.is_early, self.clock)

    def turn(self, *messages: ToHolder) -> tuple[list[str], list[ToPuller]]:
        """Leases that have become complete, and all answers."""
        granted = self.holder.take_granted()
        due = self.early.sift([(b"reader", message) for message in messages])
        answers = [self.holder.answer(message) for _, message in due]
        return granted, [answer for answer in answers if answer is not None]

    def begin(self, request_id: str = "r") -> PullBegin:
        return PullBegin(call_id=1, engine_id="1" * 32, request_id=request_id, reader="x", num_pullers=1)

    def end(self, request_id: str = "r") -> PullEnd:
        return PullEnd(call_id=2, engine_id="1" * 32, request_id=request_id, reader="x")

    def expected(self, block_ids: list[int]) -> list[list[int]]:
        return BlockHasher(self.rank.kv_cache, self.rank.layout).checksums(block_ids, slice(None))

    def written(self) -> dict[str, list[list[int]] | None]:
        return {record.grant.request_id: record.groups[0].checksums for record in read_ledger(self.ledger_fd)}


@pytest.fixture
def slow() -> SlowHolder:
    return SlowHolder()


def test_readers_wait_for_the_checksums_of_a_lease(slow):
    slow.holder.grant(grant("r", [4, 5]))
    assert slow.holder.youngest_hashing_s == slow.clock.now
    assert slow.turn(slow.begin()) == ([], [])
    assert slow.written() == {}
    slow.hasher.finish()
    granted, (answer,) = slow.turn()
    assert granted == ["r"]
    assert isinstance(answer, PullReply)
    assert answer.groups[0].checksums == slow.expected([4, 5])
    assert slow.written() == {"r": slow.expected([4, 5])}
    assert slow.turn() == ([], [])
    assert slow.holder.youngest_hashing_s is None


def test_checksums_are_those_of_the_moment_of_the_grant(slow):
    expected = slow.expected([4])
    slow.holder.grant(grant("r", [4]))
    slow.rank.kv_cache[4] += 1
    slow.hasher.finish()
    _, (answer,) = slow.turn(slow.begin())
    assert answer.groups[0].checksums == expected


def test_leases_do_not_wait_for_each_other(slow):
    slow.holder.grant(grant("a", [4]))
    slow.holder.grant(grant("b", [5]))
    slow.hasher.started[1].is_ready = True
    granted, (answer,) = slow.turn(slow.begin("a"), slow.begin("b"))
    assert granted == ["b"]
    assert answer.groups[0].checksums == slow.expected([5])


def test_a_reader_that_gives_up_meanwhile_ends_the_lease(slow):
    """Its end must not overtake its begin."""
    slow.holder.grant(grant("r", [4]))
    assert slow.turn(slow.begin(), slow.end()) == ([], [])
    slow.hasher.finish()
    _, (begun, ended) = slow.turn()
    assert isinstance(begun, PullReply)
    assert isinstance(ended, PullEndReply)
    assert ended.held
    assert slow.holder.take_ended() == [LeaseEnded(request_id="r", reason="pulled")]


def test_a_lease_that_ends_meanwhile_is_told_of_once(slow):
    """The engine counts the ranks that have granted a lease: each has to say so."""
    slow.holder.grant(grant("r", [4]))
    slow.holder.end(EndLease(request_id="r"))
    assert slow.holder.take_ended() == [LeaseEnded(request_id="r", reason="released")]
    slow.hasher.finish()
    granted, (answer,) = slow.turn(slow.begin())
    assert granted == ["r"]
    assert isinstance(answer, Refused)
    assert slow.written() == {}


def test_nothing_is_written_down_before_the_checksums(slow):
    slow.holder.grant(grant("r", [4], num_readers=3))
    slow.holder.set_readers(SetLeaseReaders(request_id="r", num_readers=2))
    assert slow.written() == {}
    slow.hasher.finish()
    slow.turn()
    assert slow.written() == {"r": slow.expected([4])}


def test_checksums_that_do_not_come_are_an_error(slow):
    slow.holder.grant(grant("r", [4]))
    assert slow.turn(slow.begin()) == ([], [])
    slow.clock.now += GRANT_LAG_S
    _, (answer,) = slow.turn()
    assert isinstance(answer, Refused)
    assert "the checksums of request r are not there yet" in answer.reason


def test_without_verification_a_lease_is_complete_at_once(slow):
    holder = Holder(slow.rank.holder._card, None, slow.clock)
    holder.grant(grant("r", [4]))
    assert holder.take_granted() == ["r"]
