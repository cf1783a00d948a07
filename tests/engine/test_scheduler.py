"""What a step computes: order, budget, rows, preemption, cached prefixes, suspects."""

import itertools

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.process.step_record import SUSPECT_BIT
from tests.engine.fake_engine import PROMPT, FakeEngine, output, remote_kv

# Batching


def test_pulled_requests_make_way_when_the_last_blocks_are_leased() -> None:
    """A lease, or worse a quarantine, may last: one of two requests that lack a block each gives
    its own to the other.
    """
    engine = FakeEngine(num_blocks=6, caching=False)
    prompts = {"a": [1] * 8, "b": [2] * 8}
    for name, prompt in prompts.items():
        engine.add(name, prompt, output=output(prompt, 1), remote_kv=remote_kv(name, 8))
    engine.add("leased", [3] * 8, max_tokens=1, do_remote_decode=True)
    engine.run()
    assert engine.stats.num_free_blocks == 0
    for pull_id in list(engine.pulls):
        engine.end_pull(pull_id)
    engine.run()
    for name, prompt in prompts.items():
        assert engine.token_ids(name) == output(prompt, 4)[1:]
    assert engine.stats.num_leased_requests == 1


# Lengths of the prompts that come before each step, again and again.
ARRIVALS = st.lists(st.lists(st.integers(2, 90), max_size=3), min_size=1, max_size=6)
NUM_STEPS = 60


# To shrink such a run takes minutes; the one that failed is printed as it is.
@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(st.sampled_from([None, 2, 7, 100]), ARRIVALS, st.integers(1, 3))
def test_prompts_that_never_end_stop_no_stream_and_streams_stop_no_prompt(
    max_beside_streams: int | None, arrivals: list[list[int]], num_streams: int
) -> None:
    engine = FakeEngine(
        max_beside_streams=max_beside_streams,
        num_blocks=400,
        max_num_seqs=200,
        max_num_batched_tokens=64,
        max_model_len=200,
        caching=False,
    )
    for number in range(num_streams):
        engine.add(f"stream-{number}", [1, 2, number], max_tokens=NUM_STEPS + 9)
    rows = {item.row for item in engine.step().scheduled}
    names = (f"prompt-{number}" for number in itertools.count())
    waiting_tokens = 0
    most = min(64 - num_streams, max_beside_streams or 64)
    for lengths in itertools.islice(itertools.cycle(arrivals), NUM_STEPS):
        for length in lengths:
            engine.add(next(names), [number % 7 for number in range(length)], max_tokens=1)
            waiting_tokens += length
        scheduled = engine.step().scheduled
        of_prompts = sum(item.num_tokens for item in scheduled if item.row not in rows)
        assert sum(item.row in rows for item in scheduled) == num_streams
        # The last token of a prompt counts as a stream's.
        assert min(most, waiting_tokens) <= of_prompts <= most + len(scheduled)
        waiting_tokens -= of_prompts


# Prefix cache


def test_a_second_prompt_computes_only_what_is_new() -> None:
    engine = FakeEngine()
    engine.add("a", PROMPT, max_tokens=7)
    engine.run()
    engine.add("b", [*PROMPT, 6, 6], max_tokens=1)
    (item,) = engine.step().scheduled
    assert (item.num_computed_tokens, item.num_tokens) == (8, 4)
    assert engine.finished["b"].num_cached_tokens == 8
    stats = engine.stats
    assert (stats.counts["prefix_cache_queries"], stats.counts["prefix_cache_hits"]) == (22, 8)
    engine.add("next turn", PROMPT + engine.token_ids("a") + [1], max_tokens=1)
    engine.add("other salt", PROMPT, max_tokens=1, cache_salt="tenant")
    engine.run()
    assert engine.finished["next turn"].num_cached_tokens == 16
    assert engine.finished["other salt"].num_cached_tokens == 0


def test_choices_of_one_prompt_wait_for_the_first_to_compute_it() -> None:
    engine = FakeEngine(max_num_batched_tokens=64)
    for choice in range(3):
        engine.add(f"a/{choice}", PROMPT, max_tokens=2)
    engine.run()
    assert engine.runners[0].num_computed_tokens == 10 + 2 + 2 + 3
    assert [engine.finished[f"a/{choice}"].num_cached_tokens for choice in range(3)] == [0, 8, 8]


def test_lower_priorities_are_computed_first() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.add("first", PROMPT)
    engine.step()
    for name, priority in (("late", 0), ("last", 3), ("urgent", -2)):
        engine.add(name, PROMPT[:4], priority=priority)
    engine.run()
    assert list(engine.finished) == ["first", "urgent", "late", "last"]


@pytest.mark.parametrize(("priority", "order"), [(0, ["a", "b"]), (1, ["b", "a"])])
def test_higher_priorities_and_the_latest_give_way(priority: int, order: list[str]) -> None:
    engine = FakeEngine(num_blocks=7, caching=False)
    engine.add("a", [1, 2, 3, 4], max_tokens=16, priority=priority)
    engine.add("b", [4, 3, 2, 1], max_tokens=16)
    engine.run()
    assert engine.stats.counts["num_preemptions"] > 0
    assert list(engine.finished) == order


# A step that is planned while the one before runs

SHORT = [1, 2, 3, 4, 5, 6]


def test_every_step_but_the_first_is_planned_while_another_runs() -> None:
    engine = FakeEngine(runs_ahead=True)
    engine.add("a", SHORT, max_tokens=12)
    plans = engine.run()
    # Then the step in flight draws the last token for certain, and at last the ranks hear of the
    # freed row.
    assert [bool(plan.scheduled) for plan in plans] == [True] * 12 + [False] * 2
    assert engine.num_ahead == 12
    assert engine.token_ids("a") == output(SHORT, 12)


@pytest.mark.parametrize(("is_pulled", "num_tokens"), [(False, [1, 3]), (True, [1, 1])])
def test_who_comes_joins_the_step_after_the_one_in_flight(
    is_pulled: bool, num_tokens: list[int]
) -> None:
    engine = FakeEngine(runs_ahead=True)
    engine.add("a", SHORT, max_tokens=30)
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


# Requests that a rank may have died of: never two in a step, none while another step runs, until
# they have survived one

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
