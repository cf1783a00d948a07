"""Pulls of prompts that are still being computed: read part by part, counted only under a lease of
the same computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from pdlaunch.protocol.kv_params import FirstToken
from pdlaunch.protocol.side_channel import (
    LONGEST_WAIT_S,
    ChecksumsReply,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    StateChecksums,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import (
    CancelPull,
    EndLease,
    GrantLease,
    LeaseEnded,
    OfferPartialPrompt,
    PullDrained,
    StartPull,
    WithdrawPartialPrompt,
)
from pdlaunch.transfer.decode_side.rank_pull import REPEAT_S
from pdlaunch.transfer.prefill_side.answers import LeaseAnswers
from pdlaunch.transfer.prefill_side.pending_questions import GRANT_LAG_S, PendingQuestions
from tests.transfer.fakes import FakeChannel, FakeClock
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, hashes, pull

TOKENS = [FirstToken(token_id=7)]


class PatientChannel(FakeChannel):
    """Questions may wait for their answers."""

    def __init__(self, holder: LeaseAnswers, clock: FakeClock) -> None:
        super().__init__(holder.answer)
        self._pending = PendingQuestions(holder.must_wait, clock)

    def send(self, message: ToPrefillSide | None) -> None:
        """None: only time has gone by."""
        if message is not None:
            self.sent.append(message)
        due = self._pending.sift([] if message is None else [(b"reader", message)])
        answers = [answer for _, question in due if (answer := self.answer(question)) is not None]
        if not self.mute:
            self.inbox += answers


class PatientWorld(World):
    """A world whose holders let questions wait, as their transfer threads do."""

    @property
    def reads(self) -> list[Sequence[int]]:
        """Blocks of this rank, by READ."""
        return [read.local_blocks for read in self.connector.block_reads]

    def open_channel(self, endpoint: str) -> FakeChannel:
        holder = self.holders[endpoint]
        holder.channels.append(PatientChannel(holder.holder, self.clock))
        return holder.channel

    def turn(self, times: int = 6) -> None:
        for _ in range(times):
            for holder in self.holders.values():
                for channel in holder.channels:
                    channel.send(None)
            super().turn(1)


@pytest.fixture
def world() -> Iterator[PatientWorld]:
    world = PatientWorld()
    yield world
    world.close()


@pytest.fixture
def holder(world: PatientWorld) -> HolderRank:
    return world.connect()


def awaited(
    holder: HolderRank, block_ids: list[int], pull_id: str = "p", **options: Any
) -> StartPull:
    return replace(pull(pull_id, holder.remote("r"), block_ids, **options), awaits=True)


def offered(block_ids: list[int], num_ready: int, num_blocks: int) -> OfferPartialPrompt:
    return OfferPartialPrompt(
        lease_id="r",
        block_ids=[block_ids],
        first_block_index=[0],
        num_ready_blocks=num_ready,
        block_hashes=hashes(num_blocks),
        num_tokens=16 * num_blocks,
    )


def lease(block_ids: list[int], **options: Any) -> GrantLease:
    return replace(grant("r", block_ids, **options), first_tokens=TOKENS)


def test_a_pull_waits_for_the_lease_and_brings_the_first_token(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    world.turn()
    assert (world.events, world.reads) == ([], [])
    holder.holder.grant(lease([4, 5]))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.first_tokens == TOKENS
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.ended() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert len(world.pulls) == 0


def test_what_is_ready_is_read_while_the_rest_is_computed(world, holder):
    world.pulls.start(awaited(holder, [1, 2, 3, 6]))
    holder.holder.offer(offered([4, 5], 0, 4))
    world.turn()
    assert world.reads == []
    holder.holder.offer(offered([4, 5, 7], 2, 4))
    world.turn()
    assert world.reads == [[1, 2]]
    holder.holder.offer(offered([4, 5, 7, 8], 3, 4))
    world.turn()
    assert world.reads == [[1, 2], [3]]
    assert world.events == []
    holder.holder.grant(lease([4, 5, 7, 8]))
    world.turn()
    assert world.reads == [[1, 2], [3], [6]]
    finished = world.finished()
    assert finished.ok
    assert finished.num_bytes == 4 * holder.layout.block_bytes
    assert torch.equal(world.kv_cache[[1, 2, 3, 6]], holder.kv_cache[[4, 5, 7, 8]])


def test_what_is_cached_is_not_read(world, holder):
    world.pulls.start(awaited(holder, [1, 2], skip=2))
    holder.holder.offer(offered([4, 5, 7, 8], 3, 4))
    world.turn()
    assert world.reads == [[1]]
    holder.holder.grant(lease([4, 5, 7, 8]))
    world.turn()
    assert world.reads == [[1], [2]]
    assert world.finished().ok


def test_where_all_is_cached_the_first_token_is_waited_for(world, holder):
    world.pulls.start(awaited(holder, [], skip=2))
    world.turn()
    assert world.events == []
    holder.holder.grant(lease([4, 5]))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.first_tokens == TOKENS
    assert world.reads == []
    assert [event.reason for event in holder.ended()] == ["pulled"]


def test_blocks_that_went_back_to_the_engine_are_read_again(world, holder):
    world.pulls.start(awaited(holder, [1, 2, 3]))
    holder.holder.offer(offered([4, 5], 2, 3))
    world.turn()
    holder.holder.withdraw(WithdrawPartialPrompt(lease_id="r"))
    holder.kv_cache[4] += 1
    world.turn()
    holder.holder.offer(offered([4, 5], 1, 3))
    world.turn()
    assert world.reads == [[1, 2], [1]]
    holder.holder.grant(lease([4, 5, 6]))
    world.turn()
    assert world.reads == [[1, 2], [1], [2, 3]]
    assert world.finished().ok
    assert torch.equal(world.kv_cache[[1, 2, 3]], holder.kv_cache[[4, 5, 6]])


@pytest.mark.parametrize("verify", [True, False])
def test_a_lease_without_offer_voids_what_was_read(verify):
    """Also where no checksum would find it out."""
    world = PatientWorld(verify=verify)
    holder = world.connect()
    world.pulls.start(awaited(holder, [1, 2]))
    holder.holder.offer(offered([4, 5], 1, 2))
    world.turn()
    holder.holder.withdraw(WithdrawPartialPrompt(lease_id="r"))
    holder.kv_cache[4] += 1
    holder.holder.grant(lease([4, 5]))
    world.turn()
    assert world.finished().ok
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def test_a_read_of_blocks_that_went_back_is_over_before_they_are_read_again(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    world.fabric.stalled = True
    holder.holder.offer(offered([4, 5], 1, 2))
    world.turn()
    holder.holder.withdraw(WithdrawPartialPrompt(lease_id="r"))
    holder.holder.grant(lease([6, 7]))
    world.turn()
    assert world.reads == [[1]]
    world.fabric.land()
    world.turn()
    assert world.reads == [[1], [1, 2]]
    world.fabric.land()
    world.turn()
    assert world.finished().ok
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[6, 7]])


def test_wrong_bytes_of_an_pending_part_are_found_and_read_again(world, holder):
    world.pulls.start(awaited(holder, [1, 2], num_attempts=2))
    holder.kv_cache[4] += 1
    holder.holder.offer(offered([4, 5], 1, 2))
    world.turn()
    holder.kv_cache[4] -= 1
    holder.kv_cache[4] *= 2
    holder.holder.grant(lease([4, 5]))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.verification_failed
    assert finished.num_retries == 1
    assert world.reads == [[1], [2], [1, 2]]
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def test_an_pending_read_that_fails_is_repeated(world, holder):
    world.pulls.start(awaited(holder, [1, 2, 3], num_attempts=2))
    holder.holder.offer(offered([4, 5, 6], 1, 3))
    world.turn()
    world.fabric.failing = True
    holder.holder.offer(offered([4, 5, 6], 2, 3))
    world.turn(1)
    world.turn(1)
    world.fabric.failing = False
    world.clock.now += 1.0
    world.turn()
    assert world.reads == [[1], [2], [2]]
    holder.holder.grant(lease([4, 5, 6]))
    world.turn()
    finished = world.finished()
    assert finished.ok
    assert finished.num_retries == 1


def test_another_prompt_is_refused_before_a_byte_is_read(world, holder):
    world.pulls.start(replace(awaited(holder, [1, 2]), block_hashes=hashes(2, "other")))
    holder.holder.offer(offered([4, 5], 1, 2))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.verification_failed
    assert world.reads == []


def test_who_gives_up_before_the_lease_leaves_it_to_another(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    holder.holder.offer(offered([4, 5], 0, 2))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.first_tokens == []
    assert len(world.pulls) == 0
    holder.holder.grant(lease([4, 5]))
    world.turn()
    assert holder.ended() == []
    world.pulls.start(pull("q", holder.remote("r"), [1, 2]))
    world.turn()
    assert world.finished().ok
    assert [event.reason for event in holder.ended()] == ["pulled"]


def test_who_gives_up_after_the_lease_has_had_its_share(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    world.fabric.stalled = True
    holder.holder.grant(lease([4, 5]))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    finished = world.finished()
    assert finished.in_flight
    assert finished.first_tokens == TOKENS
    world.turn()
    assert [event.reason for event in holder.ended()] == ["pulled"]
    world.fabric.land()
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]


def test_an_pending_read_of_a_pull_that_was_given_up_keeps_its_blocks(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    world.fabric.stalled = True
    holder.holder.offer(offered([4, 5], 1, 2))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    assert world.finished().in_flight
    holder.holder.grant(lease([4, 5]))
    world.turn()
    assert world.reads == [[1]]
    world.fabric.land()
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]


def test_an_answer_that_took_long_is_followed_by_a_heartbeat(world, holder):
    """The seconds of a lease count from the question, which was asked long before there was one."""
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    world.clock.now += REPEAT_S - 1
    holder.holder.grant(lease([4], lease_s=2.0))
    world.turn()
    assert world.finished().ok
    assert holder.sent(PullHeartbeat)


def test_the_question_is_repeated_and_waits_once(world, holder):
    world.pulls.start(awaited(holder, [1]))
    for _ in range(5):
        world.turn()
        world.clock.now += REPEAT_S
    assert len(holder.sent(PullBegin)) == 5
    holder.holder.grant(lease([4]))
    world.turn()
    assert world.finished().ok
    assert len(holder.sent(StateChecksums)) <= 1


def test_who_waits_too_long_is_refused(world, holder):
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    world.clock.now += LONGEST_WAIT_S
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.first_tokens == []
    assert "r has no lease here" in finished.error


def test_a_prompt_that_makes_no_progress_is_not_waited_for_forever(world, holder):
    world.pulls.start(awaited(holder, [1, 2]))
    holder.holder.offer(offered([4], 1, 2))
    world.turn()
    world.clock.now += LONGEST_WAIT_S
    world.turn()
    assert not world.finished().ok
    world.turn()
    assert len(world.pulls) == 0


def test_the_time_limit_of_a_pull_counts_from_the_lease(world, holder):
    world.pulls.start(awaited(holder, [1], timeout_s=3.0))
    for _ in range(3):
        world.turn()
        world.clock.now += 10.0
    world.fabric.stalled = True
    holder.holder.grant(lease([4]))
    world.turn()
    assert world.events == []
    world.clock.now += 3.0
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.first_tokens == TOKENS
    assert finished.in_flight


def test_a_holder_that_is_lost_ends_the_waiting(world, holder):
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    world.peers.update([])
    world.turn()
    assert not world.finished().ok


def test_a_lease_that_was_cancelled_is_refused(world, holder):
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    holder.holder.grant(lease([4]))
    holder.holder.end(EndLease(lease_id="r"))
    world.turn()
    assert not world.finished().ok
    assert [event.reason for event in holder.ended()] == ["released"]


def test_a_reader_of_a_group_waits_at_each_rank(world):
    holders = world.connect_group(3)
    world.pulls.start(awaited(holders[0], [1, 2]))
    world.turn()
    for holder in holders:
        assert world.events == []
        holder.holder.offer(offered([4, 5], 1, 2))
        world.turn()
    for holder in holders:
        assert world.events == []
        holder.holder.grant(lease([4, 5]))
        world.turn()
    assert world.finished().ok
    for tp_rank, holder in enumerate(holders):
        assert torch.equal(world.kv_cache[[1, 2], tp_rank], holder.kv_cache[[4, 5], 0])


def test_the_end_of_a_pull_is_told_once(world, holder):
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    world.pulls.cancel(CancelPull(pull_id="p"))
    world.clock.now += GRANT_LAG_S
    world.turn()
    assert len(holder.sent(PullEnd)) == 1


def test_checksums_are_stated_while_the_blocks_are_read(world, holder):
    LeaseAnswers.grant(holder.holder, lease([4, 5]))
    world.pulls.start(awaited(holder, [1, 2]))
    world.turn()
    assert world.reads == [[1, 2]]
    assert world.events == []
    holder.holder.advance_checksums()
    world.turn()
    assert world.finished().ok
    assert len(holder.sent(StateChecksums)) == 1


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([], "stated no checksums"),
        ([None], "stated no checksums"),
        ([bytes(8)], "stated no checksums"),
        ([bytes(48)], "differs"),
    ],
)
def test_a_holder_that_states_nonsense_fails_the_pull(world, holder, groups, error):
    LeaseAnswers.grant(holder.holder, lease([4, 5]))
    holder.holder._state_checksums = lambda message: ChecksumsReply(
        call_id=message.call_id, groups=groups
    )
    world.pulls.start(awaited(holder, [1, 2]))
    world.turn()
    holder.holder.advance_checksums()
    world.turn()
    finished = world.finished()
    assert not finished.ok
    assert finished.verification_failed
    assert error in finished.error


def test_the_time_of_a_pull_is_that_since_its_lease_is_known(world, holder):
    world.pulls.start(awaited(holder, [1]))
    world.turn()
    world.clock.now += 2.0
    world.fabric.stalled = True
    holder.holder.grant(lease([4]))
    world.turn()
    world.clock.now += 0.5
    world.fabric.land()
    world.turn()
    assert world.finished().seconds == 0.5
