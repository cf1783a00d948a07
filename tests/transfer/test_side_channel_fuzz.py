"""Well-formed questions with random content: each gets one answer, leases end properly, and other
pulls continue.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.side_channel import (
    Handshake,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    Push,
    StateChecksums,
    ToPrefillSide,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.transfer.leases import GRANT_LAG_S
from tests.transfer.fakes import layout_of
from tests.transfer.pull_world import HolderRank, World, compatibility
from tests.transfer.rank_process import grant, pull
from tests.transfer.test_push import WritingConnector

ENGINE_IDS = st.sampled_from(["1" * 32, "1" * 32, "1" * 32, "2" * 32, "x"])
REQUEST_IDS = st.sampled_from(["r", "r", "r", "unknown", "../r", "\0", "r" * 256])
READERS = st.sampled_from(["x", "y", "y" * 256])
NUMBERS = st.sampled_from([1, 2, 3, 0, -1, 2**31, 2**63 - 1, -(2**63)])
CALL_IDS = st.integers(-(2**63), 2**63 - 1)
BLOCK_IDS = st.lists(st.lists(NUMBERS, max_size=4), max_size=2) | st.just([[4] * 50_000])
HANDSHAKE = Handshake(
    call_id=1,
    engine_id="d" * 32,
    rank_name="decode-7/rank-5",
    incarnation=1,
    expected_engine_id="1" * 32,
    compatibility=compatibility(layout_of(), "decode"),
    agent_metadata=b"",
)


def of_pull(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[ToPrefillSide]:
    return st.builds(
        kind, call_id=CALL_IDS, engine_id=ENGINE_IDS, lease_id=REQUEST_IDS, reader=READERS, **fields
    )


QUESTIONS = st.one_of(
    of_pull(PullBegin, num_decode_ranks=NUMBERS),
    of_pull(StateChecksums),
    of_pull(PullHeartbeat),
    of_pull(PullEnd),
    of_pull(
        Push,
        block_ids=BLOCK_IDS,
        first_head=NUMBERS,
        num_heads=NUMBERS,
        target=st.binary(max_size=20),
    ),
    st.builds(
        Handshake,
        call_id=CALL_IDS,
        engine_id=ENGINE_IDS,
        rank_name=REQUEST_IDS,
        incarnation=NUMBERS,
        expected_engine_id=ENGINE_IDS,
        compatibility=st.just(HANDSHAKE.compatibility),
        agent_metadata=st.binary(max_size=20),
    ),
)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def holder(world: World) -> HolderRank:
    return world.connect(new_connector=WritingConnector)


@given(st.lists(QUESTIONS, max_size=20))
def test_every_question_has_an_answer_and_nobody_else_is_harmed(
    world: World, holder: HolderRank, questions: list[ToPrefillSide]
) -> None:
    before = holder.kv_cache.clone()
    holder.holder.grant(grant("r", [4, 5], num_readers=2))
    holder.holder.grant(grant("other", [6, 7]))
    received = [to_prefill_side.decode(to_prefill_side.encode(each)) for each in questions]
    answers = holder.holder.ask(*received)
    writes = holder.holder._connector.writes  # type: ignore[attr-defined]
    for (_, blocks, _), write in writes:
        assert set(*blocks) <= {4, 5}, "nothing is written that was not leased to this reader"
        write.set_result(None)
    writes.clear()
    world.clock.now += GRANT_LAG_S  # now questions about unknown leases are answered
    answers += holder.holder.ask()
    answered = [to_decode_side.decode(to_decode_side.encode(each)).call_id for each in answers]
    # PullEnd has no answer unless it is refused.
    ends = [each.call_id for each in questions if isinstance(each, PullEnd)]
    for call_id in answered:
        with contextlib.suppress(ValueError):
            ends.remove(call_id)
    assert sorted([*answered, *ends]) == sorted(each.call_id for each in questions)
    world.pulls.start(pull("p", holder.remote("other"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert finished.ok, finished.error
    assert world.kv_cache[[1, 2]].equal(holder.kv_cache[[6, 7]])
    assert holder.kv_cache.equal(before)
    world.clock.now += 10_000
    assert sorted(event.lease_id for event in holder.ended()) == ["other", "r"]
    assert holder.holder.is_idle
