"""Leases, and the questions of decode ranks about them. A lease ends once; during a pull only by
its deadline. Every question gets one answer.
"""

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlaunch.errors import LeaseError
from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    PullReply,
    Push,
    Refused,
    StateChecksums,
)
from pdlaunch.protocol.transfer import GrantLease, LeaseEnded
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher
from pdlaunch.transfer.leases import (
    GRANT_LAG_S,
    MAX_EXTENSIONS,
    MAX_OPEN_READERS,
    MAX_WAITING,
    LeaseTable,
)
from tests.clock import FakeClock
from tests.transfer.fakes import Fabric
from tests.transfer.pull_world import HolderRank
from tests.transfer.rank_process import grant


def grant_of(lease_id: str, *, num_readers: int = 1) -> GrantLease:
    return grant(lease_id, [1, 2], lease_s=10.0, num_readers=num_readers)


def ended(table: LeaseTable) -> list[tuple[str, str]]:
    return [(event.lease_id, event.reason) for event in table.take_ended()]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def leases(clock: FakeClock) -> LeaseTable:
    return LeaseTable(clock)


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_a_lease_ends_with_the_last_rank_of_the_last_reader(data, num_readers, num_decode_ranks):
    """The ranks of readers may begin several times, in any order: the lease ends exactly when the
    last rank has ended.
    """
    table = LeaseTable(FakeClock())
    table.grant(grant_of("a", num_readers=num_readers))
    readers = [
        f"{choice}/{tp_rank}"
        for choice in range(num_readers)
        for tp_rank in range(num_decode_ranks)
    ]
    calls = [(reader, data.draw(st.integers(0, 3))) for reader in readers]
    plan = [(reader, call) for reader, num_more in calls for call in (*["begin"] * num_more, "end")]
    for reader, call in data.draw(st.permutations(plan)):
        with contextlib.suppress(LeaseError):  # the rank, or the whole lease, may have ended
            table.begin("a", reader, num_decode_ranks)
        if call == "end":
            assert ended(table) == []
            table.end("a", reader)
    assert ended(table) == [("a", "pulled")]


def test_a_lease_expires_at_the_deadline_that_heartbeats_extend_but_not_for_ever(leases, clock):
    leases.grant(grant_of("a"))
    clock.now += 9
    leases.begin("a", "r", 1)
    for _ in range(4 * MAX_EXTENSIONS):
        clock.now += 5
        try:
            assert 0 < leases.heartbeat("a", "r") <= 10
        except LeaseError:
            break
    assert ended(leases) == [("a", "expired")]
    assert 1100 < clock.now <= 1005 + 10 * MAX_EXTENSIONS
    with pytest.raises(LeaseError, match="request a has no lease here"):
        leases.begin("a", "r2", 1)


def test_a_lease_has_only_so_many_open_readers(leases):
    leases.grant(grant_of("a"))
    for number in range(MAX_OPEN_READERS):
        leases.begin("a", f"r{number}", 1)
    with pytest.raises(LeaseError, match="open pulls"):
        leases.begin("a", "one more", 1)


IDS = st.sampled_from(["a", "b", "c"])
READERS = st.sampled_from(["r", "s", "t"])


class LeaseLife(RuleBasedStateMachine):
    """Every grant ends exactly once. A pull is open only for a reader that began under the present
    grant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.table = LeaseTable(self.clock)
        self.alive: set[str] = set()
        self.begun: set[tuple[str, str]] = set()

    def succeeds(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except LeaseError:
            return False
        return True

    @rule(lease_id=IDS, num_readers=st.integers(1, 2))
    def grant(self, lease_id, num_readers):
        command = grant_of(lease_id, num_readers=num_readers)
        assert self.succeeds(lambda: self.table.grant(command)) == (lease_id not in self.alive)
        self.alive.add(lease_id)

    @rule(lease_id=IDS, reader=READERS, num_decode_ranks=st.integers(0, 2))
    def begin(self, lease_id, reader, num_decode_ranks):
        if self.succeeds(lambda: self.table.begin(lease_id, reader, num_decode_ranks)):
            assert lease_id in self.alive
            assert num_decode_ranks
            self.begun.add((lease_id, reader))

    @rule(lease_id=IDS, reader=READERS)
    def end(self, lease_id, reader):
        was_open = (lease_id, reader) in self.begun and lease_id in self.alive
        assert self.succeeds(lambda: self.table.end(lease_id, reader)) == was_open
        self.begun.discard((lease_id, reader))

    @rule(lease_id=IDS)
    def cancel(self, lease_id):
        self.table.cancel(lease_id)

    @precondition(lambda self: self.alive)
    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds):
        self.clock.now += seconds
        self.table.expire()

    @invariant()
    def each_lease_ends_once(self):
        for lease_id, reason in ended(self.table):
            self.alive.remove(lease_id)
            # Readers rely on the remaining seconds in answers, so only the deadline ends a lease
            # with an open pull.
            is_open = any(other == lease_id for other, _reader in self.begun)
            assert reason == "expired" or not is_open
            self.begun = {(other, reader) for other, reader in self.begun if other != lease_id}
        assert len(self.table) == len(self.alive)


LeaseLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLeaseLife = LeaseLife.TestCase


# Questions

ASKED = {"call_id": 7, "engine_id": "1" * 32, "lease_id": "r", "reader": "x"}
BEGIN = PullBegin(**ASKED, num_decode_ranks=1)


@pytest.fixture
def rank(clock: FakeClock) -> HolderRank:
    return HolderRank(clock, Fabric())


def test_questions_wait_for_their_lease_and_keep_their_order(rank):
    """A pull that was cancelled before the lease was granted still ends it. Otherwise the lease
    would last until its deadline.
    """
    assert rank.holder.ask(BEGIN, PullEnd(**ASKED)) == []
    assert rank.holder.ask() == []
    rank.holder.grant(grant("r", [4]))
    (begun,) = rank.holder.ask()
    assert isinstance(begun, PullReply)
    assert rank.ended() == [LeaseEnded(lease_id="r", reason="pulled")]


def test_a_lease_that_does_not_come_is_refused_in_time_and_one_that_has_ended_at_once(rank, clock):
    rank.holder.ask(BEGIN)
    assert rank.holder.polling_since() == [clock.now]
    clock.now += GRANT_LAG_S
    (answer,) = rank.holder.ask()
    assert "request r has no lease here" in answer.reason
    assert rank.holder.polling_since() == []
    rank.holder.grant(grant("r", [4], lease_s=1.0))
    clock.now += 1.0
    assert [event.reason for event in rank.ended()] == ["expired"]
    (answer,) = rank.holder.ask(BEGIN)
    assert (answer.lease_end, "expired" in answer.reason) == ("expired", True)


def test_no_more_than_so_many_wait(rank):
    heartbeat = PullHeartbeat(**ASKED)
    assert rank.holder.ask(*[heartbeat] * MAX_WAITING) == []
    assert [type(answer) for answer in rank.holder.ask(heartbeat)] == [Refused]


def test_checksums_are_stated_once_they_are_computed(clock):
    is_computed = False

    class LateHasher(KVHasher):
        def start(self, *blocks) -> Checksums:
            checksums = super().start(*blocks)
            checksums.ready = lambda: is_computed
            return checksums

    rank = HolderRank(clock, Fabric(), new_hasher=LateHasher)
    rank.holder.grant(grant("r", [4]))
    question = {name: ASKED[name] for name in StateChecksums.__struct_fields__}
    assert rank.holder.ask(StateChecksums(**question)) == []
    is_computed = True
    (answer,) = rank.holder.ask()
    assert isinstance(answer, ChecksumsReply)


def test_nothing_is_pushed_by_a_connector_that_is_read(rank):
    push = Push(**ASKED, block_ids=[], first_head=0, num_heads=1, target=b"")
    (answer,) = rank.holder.ask(push)
    assert "does not write to its readers" in answer.reason
