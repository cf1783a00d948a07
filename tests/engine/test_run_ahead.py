"""A step is planned and launched while the one before runs: what may be given away meanwhile, and
what waits.
"""

from __future__ import annotations

import pytest

from pdlaunch.protocol.engine import SamplingParams
from tests.engine.fake_engine import FakeEngine, output, remote_kv, sliding

PROMPT = [1, 2, 3, 4, 5, 6]


def start(**settings: object) -> FakeEngine:
    return FakeEngine(runs_ahead=True, **settings)  # type: ignore[arg-type]


def test_every_step_but_the_first_is_planned_while_another_runs() -> None:
    engine = start()
    engine.add("a", PROMPT, max_tokens=12)
    plans = engine.run()
    # Then the step in flight draws the last token for certain, and at last the ranks hear of the
    # freed row.
    assert [bool(plan.scheduled) for plan in plans] == [True] * 12 + [False] * 2
    assert engine.num_ahead == 12
    assert engine.token_ids("a") == output(PROMPT, 12)


@pytest.mark.parametrize(("is_pulled", "num_tokens"), [(False, [1, 3]), (True, [1, 1])])
def test_who_comes_joins_the_step_after_the_one_in_flight(
    is_pulled: bool, num_tokens: list[int]
) -> None:
    engine = start()
    engine.add("a", PROMPT, max_tokens=30)
    engine.step()
    engine.add("b", [6, 5, 4], max_tokens=3, remote_kv=remote_kv("b", 3) if is_pulled else None)
    if is_pulled:
        engine.step()
        engine.end_pull(next(iter(engine.pulls)))
    else:
        assert engine.scheduler.schedule_ahead() is None, "a prompt waits for the step in flight"
    assert [item.num_tokens for item in engine.step().scheduled] == num_tokens
    engine.run()
    assert engine.num_ahead >= 28
    assert engine.token_ids("b") == output([6, 5, 4], 3)


def test_a_pull_does_not_get_a_block_that_the_step_in_flight_still_sees() -> None:
    """The window of the step that is planned begins later than that of the one that runs."""
    prompt = [4, 3, 2, 1, 0]
    engine = start(groups=(sliding(4),), num_blocks=8, caching=False, max_num_seqs=1)
    engine.add("a", prompt, max_tokens=20)
    for index in range(18):
        name = f"pull-{index}"
        engine.add(name, [5, 6], max_tokens=2, remote_kv=remote_kv(name, 2))
        engine.step()
        (pull_id,) = engine.pulls
        engine.scheduler.requests.abort(name)
        engine.end_pull(pull_id, ok=False)
    engine.run()
    assert engine.token_ids("a") == output(prompt, 20)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_what_draws_from_its_output_waits_for_it(field: str) -> None:
    engine = start()
    engine.add("a", PROMPT, sampling=SamplingParams(max_tokens=4, **{field: 0.5}))  # type: ignore[arg-type]
    engine.add("b", [6, 5], max_tokens=9)
    engine.step()
    assert engine.scheduler.schedule_ahead() is None
    engine.run()
    assert engine.num_ahead > 3, "the other one is alone at the end"


def test_nobody_gives_blocks_up_while_a_step_runs() -> None:
    engine = start(num_blocks=5, block_size=2, caching=False)
    prompts = {"a": [1, 2, 3], "b": [3, 2, 1]}
    for name, prompt in prompts.items():
        engine.add(name, prompt, max_tokens=5)
    engine.step()
    engine.step()
    assert engine.scheduler.schedule_ahead() is None
    engine.step()
    assert engine.scheduler.requests.stats().preemptions == 1
    engine.run()
    for name, prompt in prompts.items():
        assert engine.token_ids(name) == output(prompt, 5)
