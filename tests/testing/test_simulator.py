"""The policy in simulated deployments: what holds whatever comes."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.config.roles import Role
from pdlaunch.protocol.costs import StepCosts, StepWork
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import LeastWork, Policy
from pdlaunch.testing.simulator import SimEngine, SimRequest, Simulation
from tests.router.test_cost_model import costs

POLICIES = st.one_of(
    st.builds(LeastCost, max_ttft_s=st.sampled_from([None, 0.05])),
    st.builds(LeastCost, max_itl_s=st.just(0.007)),
    st.builds(LeastWork),
)
DEPLOYMENTS = st.sampled_from(
    [
        ("prefill-0", "decode-0"),
        ("prefill-0", "decode-0", "decode-1"),
        ("prefill-0", "prefill-1", "decode-0", "both-0"),
        ("both-0", "both-1"),
        ("decode-0",),
    ]
)
LOADS = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 3000), st.integers(1, 40)), min_size=1, max_size=40
)


def engines(names: Sequence[str], speed: float = 1.0, **limits: int) -> list[SimEngine]:
    found = []
    for name in names:
        role: Role = name.partition("-")[0]  # type: ignore[assignment]
        found.append(SimEngine(name, role, costs(role, **limits), speed))
    return found


def requests(load: Sequence[tuple[float, int, int]]) -> list[SimRequest]:
    return [SimRequest(number, *values) for number, values in enumerate(load)]


def keeps_limits(simulation: Simulation) -> None:
    for engine in simulation.engines.values():
        limits = engine.costs
        assert len(engine.prompts) + len(engine.streams) <= limits.max_num_seqs
        assert engine.held_tokens <= limits.num_kv_tokens
        work, streams, _ = engine.plan()
        assert work.prompt_tokens + len(streams) <= limits.max_num_batched_tokens
        # No engine rests while it could work.
        if not engine.is_stepping:
            assert not engine.prompts
            assert not engine.streams
            assert not engine.waiting or not engine.has_room_for(engine.waiting[0])


@settings(max_examples=60, deadline=None)
@given(POLICIES, DEPLOYMENTS, LOADS, st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
def test_all_are_served_within_the_limits_and_nothing_is_computed_twice(
    policy: Policy,
    names: tuple[str, ...],
    load: list[tuple[float, int, int]],
    speed: float,
    closed: bool,
) -> None:
    """Whether engines are as fast as they say, or not."""
    simulation = Simulation(
        engines(names, speed, max_num_seqs=6, num_kv_tokens=7000, max_num_batched_tokens=512),
        policy,
        pull_s=lambda request: request.num_prompt_tokens * 1e-6,
        check=keeps_limits,
    )
    sent = requests(load)
    simulation.run(sent, concurrency=8 if closed else None)
    assert len(simulation.done) == len(sent)
    for request in sent:
        assert len(request.computed_at) == 1
        assert request.num_computed == request.num_prompt_tokens
        assert len(request.tokens_at) == request.num_output_tokens
        assert request.tokens_at == sorted(request.tokens_at)
    for engine in simulation.engines.values():
        view = engine.view
        assert (view.unanswered_tokens, view.num_streams, view.context_tokens) == (0, 0, 0)
        assert (view.num_expected, view.expected_tokens) == (0, 0)
        assert engine.held_tokens == 0


@settings(max_examples=20, deadline=None)
@given(POLICIES, LOADS)
def test_nobody_waits_longer_than_the_work_that_was_there_before_him(
    policy: Policy, load: list[tuple[float, int, int]]
) -> None:
    """Those who come later do not keep a prompt from being computed: nobody starves, though more
    comes than two engines can do.
    """
    simulation = Simulation(engines(("prefill-0", "decode-0")), policy)
    sent = requests([*load, *((0.008 * number, 1000, 2) for number in range(150))])
    simulation.run(sent)
    limits = simulation.engines["decode-0"].costs
    # The least that goes on beside streams, beside as many as there can be, and a full step.
    chunk_tokens = limits.chunk_tokens(1, 0)
    chunk_s, full_s = (
        limits.steps.seconds(
            StepWork(num_streams=len(sent), context_tokens=3040 * len(sent), prompt_tokens=number)
        )
        for number in (chunk_tokens, limits.max_num_batched_tokens)
    )
    for request in sent:
        before = [other for other in sent if other.arrived_at <= request.arrived_at]
        # All of it one after the other, behind the step that runs and in one with others.
        num_tokens = sum(other.num_prompt_tokens for other in before)
        longest_s = (num_tokens / chunk_tokens + 1) * chunk_s
        assert request.ttft_s <= longest_s + 2 * full_s


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def test_a_burst_is_over_sooner_than_with_pairs_alone_and_streams_stay_steady() -> None:
    """128 prompts of 512 tokens at once, as in the table of docs/measurements."""
    load = [(0.0, 512, 256)] * 256
    found = {}
    for name, policy in (("cost", LeastCost()), ("pairs", LeastWork())):
        able = engines(("prefill-0", "decode-0"), max_num_seqs=128)
        simulation = Simulation(able, policy)
        sent = requests(load)
        simulation.run(sent, concurrency=128)
        found[name] = sent
    ttft = {name: p99([one.ttft_s for one in sent]) for name, sent in found.items()}
    ends = {name: max(one.tokens_at[-1] for one in sent) for name, sent in found.items()}
    assert ttft["cost"] < 0.8 * ttft["pairs"]
    assert ends["cost"] <= 1.02 * ends["pairs"]


def test_requests_that_come_one_by_one_leave_prefill_to_prompts() -> None:
    """25 a second: streams at the prefill engine would delay prompts, and be delayed by them."""
    arrivals = random.Random(1)
    instants = itertools.accumulate(arrivals.expovariate(25.0) for _ in range(300))
    sent = requests([(instant, 512, 256) for instant in instants])
    Simulation(engines(("prefill-0", "decode-0")), LeastCost()).run(sent)
    kinds = Counter(request.route.kind for request in sent if request.route is not None)
    assert kinds["pair"] > 0.95 * len(sent)
    gaps_s = [gap_s for request in sent for gap_s in request.gaps_s]
    assert p99(gaps_s) < 1.3 * statistics.median(gaps_s)


def test_a_wrong_estimate_is_made_up_for_by_takeovers() -> None:
    """The prefill engine is three times slower than it says: the last in its queue leave it one
    after the other, whether they have seats or not, as long as they have not begun.
    """
    load = [(0.0, 2000, 4)] * 24
    slow, decode = engines(("prefill-0", "decode-0"))
    slow.speed = 1 / 3
    simulation = Simulation([slow, decode], LeastCost())
    sent = requests(load)
    simulation.run(sent)
    assert sum(request.was_taken_over for request in sent) > 4
    assert sent[-1].was_taken_over
    assert all(len(request.computed_at) == 1 for request in sent)


def test_the_same_load_makes_the_same_run() -> None:
    load = [(0.01 * number, 100 * (1 + number % 7), 5 + number % 3) for number in range(40)]
    runs = []
    for _ in range(2):
        sent = requests(load)
        Simulation(engines(("prefill-0", "decode-0", "both-0")), LeastCost()).run(sent)
        runs.append([request.tokens_at for request in sent])
    assert runs[0] == runs[1]


def test_one_request_alone_takes_what_the_costs_say() -> None:
    (request,) = requests([(0.0, 1000, 11)])
    Simulation(engines(("both-0",)), LeastCost()).run([request])
    steps: StepCosts = costs("both").steps
    assert request.ttft_s == pytest.approx(
        steps.seconds(StepWork(prompt_tokens=1000, attended_tokens=500_000))
    )
    assert sum(request.gaps_s) == pytest.approx(
        sum(steps.decode_s(1, 1000 + number) for number in range(1, 11))
    )
