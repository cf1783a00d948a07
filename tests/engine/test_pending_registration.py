"""Blocks with which a request begins are entered into the prefix cache beside its first step, or
when somebody looks there.
"""

from __future__ import annotations

import pytest

from tests.engine.fake_engine import PROMPT, FakeEngine, output, remote_kv


def pulled(engine: FakeEngine, **fields: object) -> None:
    """``d`` has its prompt's blocks, and no step has been planned since."""
    engine.add("d", PROMPT, output=output(PROMPT, 1), remote_kv=remote_kv("x", 10), **fields)
    engine.step()
    engine.end_pull(next(iter(engine.pulls)))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_the_step_does_not_wait_for_the_books(runs_ahead: bool) -> None:
    engine = FakeEngine(num_chunks=100, runs_ahead=runs_ahead)
    pulled(engine, max_tokens=8)
    first = engine.step()
    assert first.scheduled
    assert first.jobs == []
    second = engine.step()
    assert [job.direction for job in second.jobs] == ["store"]
    assert engine.finished == {}


def test_who_looks_meanwhile_finds_them() -> None:
    engine = FakeEngine()
    pulled(engine)
    engine.add("same", PROMPT, max_tokens=1)
    plan = engine.step()
    assert [(item.num_computed_tokens, item.num_tokens) for item in plan.scheduled] == [
        (10, 1),
        (8, 2),
    ]


def test_another_choice_pulls_only_the_rest() -> None:
    engine = FakeEngine()
    pulled(engine)
    engine.add("d/1", PROMPT, remote_kv=remote_kv("x", 10))
    engine.step()
    (pull,) = engine.pulls.values()
    assert pull.first_block_index == [2]


def test_one_that_is_aborted_before_its_first_step_leaves_them_to_others() -> None:
    engine = FakeEngine()
    pulled(engine)
    engine.scheduler.requests.abort("d")
    engine.take_outputs()
    engine.add("same", PROMPT, max_tokens=1)
    engine.run()
    assert engine.finished["same"].num_cached_tokens == 8


def test_one_that_makes_way_before_its_first_step_finds_them_again() -> None:
    """Two that lack a block each: nothing runs, and a lease has the other blocks."""
    engine = FakeEngine(num_blocks=6)
    prompts = {"a": [1] * 8, "b": [2] * 8}
    for name, prompt in prompts.items():
        engine.add(name, prompt, output=output(prompt, 1), remote_kv=remote_kv(name, 8))
    engine.add("leased", [3] * 8, max_tokens=1, do_remote_decode=True)
    engine.run()
    for pull_id in list(engine.pulls):
        engine.end_pull(pull_id)
    engine.run()
    assert engine.scheduler.requests.figures.stats().preemptions == 1
    assert engine.num_pulls == 2
    assert engine.runners[0].num_computed_tokens == 8 + 3 + 5 + 2, (
        "of the two blocks that b gave back, a has taken one"
    )
    for name, prompt in prompts.items():
        assert engine.token_ids(name) == output(prompt, 4)[1:]
