"""A prefill engine tells of the blocks of an awaited prompt while it computes them; what is told is
checked by ``FakeEngine``.
"""

from __future__ import annotations

from pdlaunch.protocol.transfer import (
    GrantLease,
    OfferPartialPrompt,
    TransferCommand,
    WithdrawPartialPrompt,
)
from tests.engine.fake_engine import FULL, FakeEngine, sliding, stop_at_first

PROMPT = [*range(6), *range(6), *range(6), 1, 2]
"""Five blocks of 4."""


def compute(
    engine: FakeEngine, name: str = "a", prompt: list[int] = PROMPT, **fields: object
) -> None:
    engine.add(
        name, prompt, **{"max_tokens": 1, "do_remote_decode": True, "is_awaited": True, **fields}
    )  # type: ignore[arg-type]


def commands(engine: FakeEngine) -> list[TransferCommand]:
    return [command for plan in engine.run() for command in plan.commands]


def ready(found: list[TransferCommand]) -> list[int]:
    return [
        command.num_ready_blocks for command in found if isinstance(command, OfferPartialPrompt)
    ]


def test_each_chunk_tells_of_the_ones_before_and_the_lease_comes_last() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    compute(engine)
    found = commands(engine)
    assert [type(command) for command in found] == [
        OfferPartialPrompt,
        OfferPartialPrompt,
        OfferPartialPrompt,
        GrantLease,
    ]
    assert ready(found) == [0, 2, 4]
    *offered, grant = found
    assert isinstance(grant, GrantLease)
    for number, command in enumerate(offered):
        assert isinstance(command, OfferPartialPrompt)
        assert (command.num_tokens, command.first_block_index, command.block_hashes) == (
            20,
            [0],
            grant.block_hashes,
        )
        # Those that this step fills are among them.
        assert command.block_ids == [grant.block_ids[0][: 2 * number + 2]]
    assert engine.withdrawn == []


def test_only_prompts_that_are_awaited_are_told_of() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    compute(engine, is_awaited=False)
    engine.add("plain", PROMPT)
    assert [type(command) for command in commands(engine)] == [GrantLease]


def test_what_has_left_a_window_is_not_told_of() -> None:
    engine = FakeEngine(groups=(FULL, sliding(6)), max_num_batched_tokens=8)
    compute(engine)
    *_, last, grant = commands(engine)
    assert isinstance(last, OfferPartialPrompt)
    assert isinstance(grant, GrantLease)
    assert last.first_block_index == [0, 2]
    assert grant.first_block_index == [0, 3]
    assert last.block_ids[1][1:] == grant.block_ids[1]


def test_cached_blocks_are_ready() -> None:
    engine = FakeEngine()
    engine.add("before", PROMPT[:12], max_tokens=1)
    engine.run()
    compute(engine)
    assert ready(commands(engine)) == [3]


def test_blocks_from_the_host_are_ready() -> None:
    engine = FakeEngine(num_blocks=8, num_chunks=100, max_num_batched_tokens=32)
    engine.add("before", PROMPT[:12], max_tokens=1)
    engine.run_all()
    engine.add("other", [6] * 30, max_tokens=1)
    engine.run_all()
    compute(engine)
    assert commands(engine) == []
    engine.end_jobs()
    assert ready(commands(engine)) == [3]


def test_a_preempted_prompt_is_withdrawn_and_told_of_anew() -> None:
    engine = FakeEngine(num_blocks=7, max_num_batched_tokens=4, caching=False)
    engine.add("first", [1, 2, 3], max_tokens=20)
    engine.step()
    compute(engine)
    found = commands(engine)
    assert engine.scheduler.requests.figures.stats().preemptions == 1
    withdrawn = found.index(WithdrawPartialPrompt(lease_id="a"))
    before, after = found[:withdrawn], found[withdrawn + 1 :]
    assert ready(before)[0] == ready(after)[0] == 0
    assert len(ready(before)) == len(before) > 1
    assert isinstance(after[-1], GrantLease)
    assert len(ready(after)) == len(after) - 1 == 5


def test_the_plan_in_which_others_get_the_blocks_withdraws_them() -> None:
    engine = FakeEngine(num_blocks=6, max_num_batched_tokens=8, caching=False)
    compute(engine)
    (offered,) = engine.step().commands
    assert isinstance(offered, OfferPartialPrompt)
    engine.scheduler.requests.abort("a")
    engine.take_outputs()
    engine.add("next", [6] * 20, max_tokens=1)
    plan = engine.step()
    assert plan.commands == [WithdrawPartialPrompt(lease_id="a")]
    assert {*offered.block_ids[0]} & {
        block_id for new in plan.new_blocks for block_id in new.block_ids
    }


def test_one_that_ends_without_a_lease_is_withdrawn() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    compute(engine, sampling=stop_at_first(PROMPT, 1))
    found = commands(engine)
    assert [type(command) for command in found] == [OfferPartialPrompt] * 3 + [
        WithdrawPartialPrompt
    ]


def test_one_that_was_never_told_of_needs_no_withdrawal() -> None:
    engine = FakeEngine()
    compute(engine)
    engine.scheduler.requests.abort("a")
    engine.take_outputs()
    assert engine.step().commands == []


def test_what_a_step_in_flight_computes_is_not_ready() -> None:
    """One token of the prompt is left: its step is planned while the one before runs."""
    engine = FakeEngine(max_num_batched_tokens=16, runs_ahead=True)
    compute(engine, prompt=PROMPT[:17])
    found = commands(engine)
    assert engine.num_ahead
    assert ready(found) == [0, 0]
    assert isinstance(found[-1], GrantLease)


def test_prompts_are_hashed_without_a_prefix_cache_too() -> None:
    engine = FakeEngine(max_num_batched_tokens=8, caching=False)
    compute(engine)
    assert ready(commands(engine)) == [0, 2, 4]
