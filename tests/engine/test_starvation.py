"""Neither streams nor prompts of an engine wait for ever for the others, whatever comes."""

from __future__ import annotations

import itertools

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pdlaunch.protocol.costs import EngineCosts, StepCosts, StreamPauses
from tests.engine.fake_engine import FakeEngine

NUM_STEPS = 60
BLOCK_SIZE = 4
COSTS = st.builds(
    lambda step_s, prompt_s, attended_s, max_itl_s: EngineCosts(
        StepCosts(step_s, 1e-4, 0.0, prompt_s, attended_s),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=BLOCK_SIZE,
        num_kv_tokens=10_000,
        kv_bytes_per_token=1,
        max_itl_s=max_itl_s,
        max_slowdown=2.0,
    ),
    st.sampled_from([0.0, 0.005, 0.05]),
    st.sampled_from([0.0, 2e-5, 1e-3, 0.02]),
    st.sampled_from([0.0, 1e-5]),
    st.sampled_from([None, None, 0.001, 0.01]),
)
ARRIVALS = st.lists(st.lists(st.integers(2, 90), max_size=3), min_size=1, max_size=6)
"""Lengths of the prompts that come before each step, again and again."""


# To shrink such a run takes minutes; the one that failed is printed as it is.
@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(COSTS, ARRIVALS, st.integers(1, 3))
def test_prompts_that_never_end_stop_no_stream_and_streams_stop_no_prompt(
    costs: EngineCosts, arrivals: list[list[int]], num_streams: int
) -> None:
    engine = FakeEngine(
        costs=lambda: costs,
        num_blocks=400,
        max_num_seqs=200,
        max_num_batched_tokens=costs.max_num_batched_tokens,
        max_model_len=200,
        caching=False,
    )
    for number in range(num_streams):
        engine.add(f"stream-{number}", [1, 2, number], max_tokens=NUM_STEPS + 9)
    rows = {item.row for item in engine.step().scheduled}
    names = (f"prompt-{number}" for number in itertools.count())
    waiting_tokens = num_pauses = num_gaps = 0
    pause_s: list[float] = []
    for lengths in itertools.islice(itertools.cycle(arrivals), NUM_STEPS):
        for length in lengths:
            engine.add(next(names), [number % 7 for number in range(length)], max_tokens=1)
            waiting_tokens += length
        scheduled = engine.step().scheduled
        of_prompts = sum(item.num_tokens for item in scheduled if item.row not in rows)
        num_going_on = sum(item.row in rows for item in scheduled)
        assert num_going_on in (0, num_streams)
        if not (num_going_on and pause_s):
            assert of_prompts >= min(BLOCK_SIZE, waiting_tokens), "but for the end of a pause"
        waiting_tokens -= of_prompts
        if num_going_on:
            pause_s = []
            num_gaps += num_streams
            continue
        num_pauses += not pause_s
        pause_s.append(
            costs.steps.step_s
            + sum(
                costs.steps.tokens_s(item.num_tokens, item.num_computed_tokens)
                for item in scheduled
                if item.row not in rows
            )
        )
        # All steps of a pause but the last one fit into its time; without a known time it is one.
        assert sum(pause_s[:-1]) < StreamPauses.MAX_S
        assert all(pause_s[:-1])
    longest = costs.most_long_gaps + StreamPauses.SHARE * num_gaps
    # The last pause may be for some more than are left.
    assert num_pauses * num_streams <= longest + num_streams * (costs.most_long_gaps > 0)
