"""Requests that a rank may have died of: never two in a step, none while another step runs, until
they have survived one.
"""

from __future__ import annotations

import pytest

from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.process.step_record import SUSPECT_BIT
from tests.engine.fake_engine import FakeEngine, output

PROMPTS = {"a": [1, 2, 3], "b": [2, 3, 4, 5, 6], "c": [3, 4]}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_two_suspects_are_never_in_flight_together_and_all_are_answered(runs_ahead: bool) -> None:
    engine = FakeEngine(runs_ahead=runs_ahead, max_num_batched_tokens=4)
    engine.add("innocent", [5, 5, 5], max_tokens=20, origin=9)
    engine.step()
    for origin, name in enumerate("abc", 1):
        engine.add(name, PROMPTS[name], max_tokens=6, origin=origin, is_suspect=True)
    seen: set[int] = set()
    launch = engine._launch

    def watch(plan: StepPlan) -> None:
        marks = engine.scheduler.requests.batch.marks()
        found = [mark - SUSPECT_BIT for mark in marks if mark & SUSPECT_BIT]
        assert len(found) <= 1
        assert not found or len(engine.in_flight) == 0, "another step runs"
        seen.update(found)
        launch(plan)

    engine._launch = watch  # type: ignore[method-assign]
    engine.run()
    assert seen == {1, 2, 3}
    assert engine.token_ids("innocent") == output([5, 5, 5], 20)
    for name, prompt in PROMPTS.items():
        assert engine.token_ids(name) == output(prompt, 6)


def test_suspect_that_has_survived_a_step_is_none_any_more() -> None:
    engine = FakeEngine()
    for name in "ab":
        engine.add(name, PROMPTS[name], max_tokens=6, origin=1, is_suspect=True)
    assert [len(engine.step().scheduled) for _ in range(2)] == [1, 2]
