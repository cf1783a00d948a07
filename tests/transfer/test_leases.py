from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlaunch.errors import LeaseError
from pdlaunch.protocol.side_channel import GroupBlocks
from pdlaunch.protocol.transfer import GrantLease
from pdlaunch.transfer.leases import MAX_EXTENSIONS, LeaseTable
from tests.transfer.fakes import FakeClock


def grant_of(lease_id: str, *, num_readers: int = 1, lease_s: float = 10.0) -> GrantLease:
    return GrantLease(
        lease_id=lease_id,
        block_ids=[[1, 2]],
        first_block_index=[0],
        block_hashes=[b"a" * 32, b"b" * 32],
        num_tokens=32,
        num_readers=num_readers,
        lease_s=lease_s,
    )


GROUPS = [GroupBlocks(first_block_index=0, block_ids=[1, 2], checksums=None)]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def leases(clock: FakeClock) -> LeaseTable:
    return LeaseTable(clock)


def test_a_reader_that_begins_anew_has_one_share(leases):
    leases.grant(grant_of("a", num_readers=2))
    for _ in range(3):
        leases.begin("a", "first", 1)
    assert leases.end("a", "first")
    assert not leases.end("a", "first")
    with pytest.raises(LeaseError, match="reader first has ended its pull of request a"):
        leases.begin("a", "first", 1)
    assert leases.take_ended() == []
    leases.begin("a", "second", 1)
    assert leases.end("a", "second")
    assert leases.take_ended() == [("a", "pulled")]


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_a_lease_ends_with_the_last_rank_of_the_last_reader(data, num_readers, num_decode_ranks):
    """However often the ranks of each reader begin anew, and in whatever order: never before, and
    never without.
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
    num_ended = 0
    for reader, call in data.draw(st.permutations(plan)):
        if call == "begin" and num_ended < len(readers):
            with contextlib.suppress(LeaseError):  # of a rank that has ended
                table.begin("a", reader, num_decode_ranks)
        elif call == "end":
            assert table.take_ended() == []
            with contextlib.suppress(LeaseError):
                table.begin("a", reader, num_decode_ranks)
            assert table.end("a", reader)
            num_ended += 1
    assert table.take_ended() == [("a", "pulled")]


def test_expires_at_the_deadline_and_proves_nothing_after(leases, clock):
    leases.grant(grant_of("a"))
    clock.now += 9
    leases.begin("a", "r", 1)
    clock.now += 9
    assert leases.heartbeat("a", "r") == 10
    clock.now += 10
    assert not leases.end("a", "r")
    assert leases.take_ended() == [("a", "expired")]
    with pytest.raises(LeaseError, match="request a has no lease here"):
        leases.begin("a", "r2", 1)
    with pytest.raises(LeaseError):
        leases.heartbeat("a", "r")


def test_a_new_lease_under_the_same_id_proves_nothing_for_an_old_reader(leases, clock):
    leases.grant(grant_of("a"))
    leases.begin("a", "old", 1)
    clock.now += 11
    leases.expire()
    leases.grant(grant_of("a"))
    assert not leases.end("a", "old")


def test_cancel_waits_for_the_open_pull_and_admits_no_other(leases):
    leases.grant(grant_of("a", num_readers=2))
    leases.begin("a", "r", 1)
    leases.cancel("a")
    assert leases.take_ended() == []
    with pytest.raises(LeaseError, match="cancelled"):
        leases.begin("a", "other", 1)
    assert leases.end("a", "r")
    assert leases.take_ended() == [("a", "released")]


def test_heartbeats_cannot_keep_a_lease_for_ever(leases, clock):
    leases.grant(grant_of("a"))
    leases.begin("a", "r", 1)
    for _ in range(4 * MAX_EXTENSIONS):
        clock.now += 5
        try:
            leases.heartbeat("a", "r")
        except LeaseError:
            break
    assert leases.take_ended() == [("a", "expired")]
    assert clock.now <= 1000 + 10 * MAX_EXTENSIONS


def test_bad_numbers_are_refused(leases):
    leases.grant(grant_of("a"))
    with pytest.raises(LeaseError, match="num_decode_ranks is 0"):
        leases.begin("a", "r", 0)
    with pytest.raises(LeaseError, match="already"):
        leases.grant(grant_of("a"))


IDS = st.sampled_from(["a", "b", "c"])
READERS = st.sampled_from(["r", "s", "t"])


class LeaseLife(RuleBasedStateMachine):
    """Every grant ends exactly once, and a proof is given only for a reader that began under this
    very grant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.table = LeaseTable(self.clock)
        self.alive: set[str] = set()
        self.begun: set[tuple[str, str]] = set()

    @rule(lease_id=IDS, num_readers=st.integers(1, 2))
    def grant(self, lease_id, num_readers):
        if lease_id in self.alive:
            with pytest.raises(LeaseError):
                self.table.grant(grant_of(lease_id))
            return
        self.table.grant(grant_of(lease_id, num_readers=num_readers))
        self.alive.add(lease_id)

    @rule(lease_id=IDS, reader=READERS, num_decode_ranks=st.integers(1, 2))
    def begin(self, lease_id, reader, num_decode_ranks):
        try:
            self.table.begin(lease_id, reader, num_decode_ranks)
        except LeaseError:
            return
        assert lease_id in self.alive
        self.begun.add((lease_id, reader))

    @rule(lease_id=IDS, reader=READERS)
    def end(self, lease_id, reader):
        held = self.table.end(lease_id, reader)
        assert held == ((lease_id, reader) in self.begun and lease_id in self.alive)
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
        for lease_id, reason in self.table.take_ended():
            self.alive.remove(lease_id)
            # Readers count on the seconds that they were told: only the deadline ends a lease under
            # an open pull.
            assert reason == "expired" or not any(
                other == lease_id for other, _reader in self.begun
            )
            self.begun = {(other, reader) for other, reader in self.begun if other != lease_id}
        assert len(self.table) == len(self.alive)


LeaseLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLeaseLife = LeaseLife.TestCase
