"""A step is planned and launched while the one before runs: what may be given away meanwhile, and
what waits.
"""

from __future__ import annotations

import pytest

from pdlaunch.protocol.engine import SamplingParams
from tests.engine.fake_engine import FakeEngine, output, remote_kv

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


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_what_draws_from_its_output_waits_for_it(field: str) -> None:
    engine = start()
    engine.add("a", PROMPT, sampling=SamplingParams(max_tokens=4, **{field: 0.5}))  # type: ignore[arg-type]
    engine.add("b", [6, 5], max_tokens=9)
    engine.step()
    assert engine.scheduler.schedule_ahead() is None
    engine.run()
    assert engine.num_ahead > 3, "the other one is alone at the end"
