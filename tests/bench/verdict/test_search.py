"""Properties of the search, and the load that all arms get."""

import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.bench.serve import BenchLoad, TraceRequest, summarise
from pdlaunch.bench.timed_completion import Goals, TimedCompletion
from pdlaunch.bench.verdict.arms import Arm, all_arms
from pdlaunch.bench.verdict.measure import Load, what_limits
from pdlaunch.bench.verdict.queueing import EngineFigures, Job, simulate
from pdlaunch.bench.verdict.search import (
    Estimate,
    Findings,
    Probe,
    Race,
    estimate,
    is_sure,
    next_rate,
)
from pdlaunch.config.shared_settings import RoutingPolicy

ROW = summarise(BenchLoad(input_tokens=1, requests=()), [], 1.0)
FIGURES = EngineFigures(
    prefill=[(100, 0.2)],
    steps=[(1, 0.04), (4, 0.07)],
    chunk_tokens=50,
    max_batched_tokens=500,
    max_num_seqs=8,
)


def probe(rate: float, num_met: int, number: int = 40) -> Probe:
    met = [place < num_met for place in range(number)]
    random.Random(rate).shuffle(met)
    return Probe(arm="a", visit=1, rate=rate, met=met, seconds=10.0, row=ROW)


def estimated(*probes: Probe) -> Estimate:
    return estimate(probes, 0.9)


@given(st.floats(0.05, 500.0), st.floats(0.1, 10.0))
def test_a_bisection_comes_close_to_the_goodput_in_few_probes(truth: float, off: float) -> None:
    probes: list[Probe] = []
    while rate := next_rate(probes, truth * off, 0.9, 1.4):
        probes.append(probe(rate, 40 if rate <= truth else 0))
    assert len(probes) <= 13
    found = estimated(*probes)
    assert not found.bound
    assert found.low <= truth * 1.06
    assert truth <= found.high * 1.06


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(0, 40)), min_size=1, max_size=8))
def test_an_interval_holds_its_estimate_whatever_was_measured(
    points: list[tuple[float, int]],
) -> None:
    found = estimated(*(probe(rate, num_met) for rate, num_met in points))
    assert 0 < found.low <= found.high
    low, high = min(points)[0], max(points)[0]
    assert low / 2 <= found.rate <= high * 2


def test_more_requests_make_a_narrower_interval_and_overlapping_arms_are_equal() -> None:
    few = estimated(probe(2.0, 19, 20), probe(2.4, 17, 20))
    many = estimated(probe(2.0, 380, 400), probe(2.4, 340, 400))
    other = estimated(probe(2.1, 19, 20), probe(2.5, 17, 20))
    slow = estimated(probe(1.0, 20, 20), probe(1.2, 10, 20))
    assert many.high - many.low < few.high - few.low
    assert not is_sure(other, few)
    assert is_sure(few, slow)


def test_an_arm_whose_goodput_is_only_bounded_wins_nothing_by_extrapolation() -> None:
    never, always = estimated(probe(4.0, 0)), estimated(probe(3.0, 40))
    known = estimated(probe(1.0, 40), probe(1.1, 0))
    assert [str(never), str(always)] == ["less than 4", "at least 3"]
    assert not is_sure(never, known), "it may be far below"
    assert not is_sure(known, always)
    assert is_sure(always, known)


def after_its_time(arms: list[Arm], prediction: float) -> tuple[Race, Findings]:
    """Measure arms whose goodput is 2 in a race whose time is over."""
    race = Race(arms, 0.9, 60.0, 10.0)
    race.predictions.update({arm.name: prediction for arm in arms})
    found = Findings(figures={1: FIGURES}, hand_over_s=0.0, spent_s=90.0)
    while (step := race.next_step(found)) is not None:
        one = probe(step.rate, 40 if step.rate < 2 else 0)
        found.probes.append(msgspec.structs.replace(one, arm=step.arm.name, visit=step.visit))
    return race, found


def test_when_the_time_is_over_no_further_arm_is_begun() -> None:
    arms = [Arm(1, num_both=3), *(Arm(1, num_prefill=n, num_decode=3 - n) for n in (2, 1))]
    _, found = after_its_time(arms, 2.0)
    assert {each.arm for each in found.probes} == {arm.name for arm in arms[:2]}


def test_a_first_rate_that_was_far_too_high_does_not_end_without_a_goodput() -> None:
    race, found = after_its_time([Arm(1, num_both=2), Arm(1, num_prefill=1, num_decode=1)], 8.0)
    first, second = (arm.name for arm in race.arms)
    visits = dict.fromkeys((each.arm, each.visit) for each in found.probes)
    assert [*visits] == [(first, 1), (second, 1), (second, 2), (first, 2)], "drift decides nothing"
    assert [each.bound for each in race.estimates(found).values()] == ["", ""]


def test_of_many_arms_five_are_measured_though_a_prediction_was_wrong() -> None:
    arms = list(all_arms(8))
    race = Race(arms, 0.9, 60.0, 10.0)
    race.predictions.update({arm.name: 9.0 - place / 10 for place, arm in enumerate(arms)})
    probes = [
        msgspec.structs.replace(each, arm=arms[0].name) for each in (probe(1, 40), probe(2, 0))
    ]
    out = race.ruled_out(Findings(probes=probes, ended=[(arms[0].name, 1)]))
    assert {arm.name for arm in arms[:5]} == {arm.name for arm in arms} - {*out}
    assert {*out.values()} == {"no time"}
    assert "below the best" in race.ruled_out(Findings())["1 x TP8"]


@given(st.integers(1, 16))
def test_arms_use_all_devices_and_have_names_of_their_own(num_devices: int) -> None:
    arms = list(all_arms(num_devices))
    assert all(arm.num_devices == num_devices for arm in arms)
    assert len({arm.name for arm in arms}) == len(arms)
    assert {Arm(num_devices, num_both=1), Arm(1, num_both=num_devices)} <= {*arms}


def test_a_step_with_a_chunk_of_a_prompt_stalls_the_streams_of_its_engine_alone() -> None:
    jobs = [Job(0.0, 100, 11), Job(0.35, 100, 2)]
    together = simulate(Arm(1, num_both=1), jobs, FIGURES, 0.01)
    assert together[0].ttft_s == pytest.approx(0.2)
    assert max(together[0].all_gaps_s) == pytest.approx(0.14), "a step and half of a prompt"
    apart = simulate(Arm(1, num_prefill=1, num_decode=1), jobs, FIGURES, 0.01)
    assert max(apart[0].all_gaps_s) < 0.12
    assert apart[0].all_gaps_s[0] == pytest.approx(0.05), "the hand-over and a step"
    assert [len(each.tokens_at) for each in (*together, *apart)] == [11, 2, 11, 2]


def test_decode_computes_a_prompt_when_prefill_would_be_later_and_routing_allows_it() -> None:
    jobs = [Job(0.0, 100, 2), Job(0.0, 100, 2), Job(0.0, 100, 2)]
    pair = Arm(1, num_prefill=1, num_decode=1)
    by_pairs = [each.ttft_s for each in simulate(pair, jobs, FIGURES, 0.01, "pairs")]
    by_load = [each.ttft_s for each in simulate(pair, jobs, FIGURES, 0.01, "load")]
    assert by_pairs == pytest.approx([0.6, 0.6, 0.6]), "one step computes them all"
    assert by_load == pytest.approx([0.4, 0.2, 0.4])


@pytest.mark.parametrize("policy", ["pairs", "load"])
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 300), st.integers(1, 30)), min_size=1))
def test_every_request_gets_its_tokens_in_order(
    policy: RoutingPolicy, sizes: list[tuple[float, int, int]]
) -> None:
    jobs = sorted(Job(*size) for size in sizes)
    for arm in all_arms(3):
        for job, done in zip(jobs, simulate(arm, jobs, FIGURES, 0.01, policy), strict=True):
            assert len(done.tokens_at) == job.output_tokens
            assert done.ttft_s > 0
            assert done.tokens_at == sorted(done.tokens_at)


def test_all_arms_get_the_same_requests_and_no_prompt_twice() -> None:
    load = Load(requests=[TraceRequest(40, 8, 0.0)], prefix=[7] * 10, probe_s=10.0)
    assert load.jobs_at(3.0, 1) == load.jobs_at(3.0, 1) != load.jobs_at(3.0, 2)
    faster = load.jobs_at(6.0, 1)
    assert faster[-1].at_s == pytest.approx(59 / 6.0), "its rate is exact"
    prompts = load.prompts(30, 1) + load.prompts(30, 2)
    assert all(prompt[:10] == [7] * 10 and len(prompt) == 50 for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 60


def test_a_trace_keeps_its_bursts_at_every_rate_and_its_shared_blocks_count_once() -> None:
    requests = [
        TraceRequest(1024, 5, at_ms, [1, number]) for number, at_ms in enumerate((0, 1, 99))
    ]
    load = Load(requests=requests, probe_s=10.0)
    jobs = load.jobs_at(2.0, 0)
    gaps = [late.at_s - early.at_s for early, late in pairwise(jobs)]
    assert gaps[1] == pytest.approx(98 * gaps[0])
    assert jobs[-1].at_s == pytest.approx((len(jobs) - 1) / 2.0)
    assert [job.prompt_tokens for job in jobs[:6]] == [1024, 512, 512] * 2
    prompts = load.prompts(6, 0)
    assert prompts[0][:512] == prompts[1][:512] != prompts[3][:512], "the trace begins again"


@pytest.mark.parametrize(
    ("tokens_at", "arm", "cause"),
    [
        ([1.2, 1.3, 1.4], Arm(1, num_prefill=1, num_decode=1), "prefill queue"),
        ([1.2, 1.3, 1.4], Arm(1, num_both=2), "prefill queue"),
        ([0.1, 0.5, 0.6], Arm(1, num_prefill=1, num_decode=1), "hand-over"),
        ([0.1, 0.2, 0.6], Arm(1, num_prefill=1, num_decode=1), "decode steps"),
        ([0.1, 0.2, 0.6], Arm(1, num_both=2), "prefill beside streams"),
        ([0.1, 0.2, 0.3], Arm(1, num_both=2), ""),
    ],
)
def test_what_limits_is_what_most_requests_missed(
    tokens_at: list[float], arm: Arm, cause: str
) -> None:
    done = [TimedCompletion(start_at=0.0, tokens_at=tokens_at, num_tokens=3)]
    assert what_limits(arm, done, Goals(ttft_ms=1000, itl_ms=200)) == cause
