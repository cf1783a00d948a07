"""Neither streams nor prompts of an engine wait for ever for the others, whatever comes."""

from __future__ import annotations

import itertools

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engine.fake_engine import FakeEngine

NUM_STEPS = 60
ARRIVALS = st.lists(st.lists(st.integers(2, 90), max_size=3), min_size=1, max_size=6)
"""Lengths of the prompts that come before each step, again and again."""


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


def test_streams_stay_short_beside_a_long_prompt_which_has_the_step_when_they_end() -> None:
    engine = FakeEngine(max_beside_streams=4, max_num_batched_tokens=16, num_blocks=64)
    engine.add("stream", [1, 2], max_tokens=3)
    engine.step()
    engine.add("prompt", [5] * 30, max_tokens=1)
    chunks = [
        sorted(item.num_tokens for item in engine.step().scheduled if item.num_tokens > 1)
        for _ in range(4)
    ]
    assert chunks == [[4], [4], [16], [6]]
