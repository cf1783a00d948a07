"""The comparison of arms that docs/measurements/routing.md shows."""

from __future__ import annotations

import sys

import pytest

from pdlaunch.protocol.costs import MAX_SLOWDOWN
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import LeastWork
from pdlaunch.testing import simulated_arms
from pdlaunch.testing.simulated_arms import ARMS, H200, SLOWNESS, medians, read_load


@pytest.mark.parametrize("text", ["512/256@32", "512/256@4.5rps"])
def test_a_load_is_read(text: str) -> None:
    load = read_load(text)
    assert (load.num_prompt_tokens, load.num_output_tokens) == (512, 256)
    assert (load.concurrency, load.per_second) == ((32, None) if "rps" not in text else (None, 4.5))
    assert [one.arrived_at for one in load.requests()] == [
        one.arrived_at for one in load.requests()
    ]


@pytest.mark.parametrize("text", ["512/256@32", "512/256@128", "2048/256@8", "2048/256@32"])
def test_bursts_by_cost_are_as_good_as_by_the_better_of_the_others(text: str) -> None:
    """The goal for bursts, within 5 %; with 128 at once steps with prompts are about one in a
    hundred, so that it is a matter of luck whether ITL p99 is one of them. They take twice as long
    as others at most, but for what steps differ by.
    """
    load = read_load(text)
    cost, pairs, both = (medians(load, arm, H200) for arm in ("cost", "pairs", "both"))
    assert cost.ttft[1] <= 1.05 * min(both.ttft[1], pairs.ttft[1])
    if load.concurrency == 128:
        assert cost.itl[1] <= MAX_SLOWDOWN * SLOWNESS[1] * cost.itl[0]
    else:
        assert cost.itl[1] <= 1.05 * min(pairs.itl[1], both.itl[1])
    assert cost.tokens_per_s >= 0.95 * max(both.tokens_per_s, pairs.tokens_per_s)


def test_each_arm_prints_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulated_arms", "64/8@4", "64/8@5rps"])
    simulated_arms.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["64/8, 4 at once"] * 3 + ["64/8, 5/s"] * 3
    assert {LeastCost, LeastWork} == {policy for _, policy in ARMS.values()}
