"""What steps cost, and how long the chunks of a prompt may be beside streams."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.step import ScheduledRow, StepPlan
from pdlaunch.engine.step_costs import AttentionShares, StepModel, limits_of, work_of
from pdlaunch.engine.warm_up import WarmUp
from pdlaunch.protocol.costs import (
    MAX_SLOWDOWN,
    EngineCosts,
    StepCosts,
    StepWork,
    StreamPauses,
)
from tests.checks.contexts import SHAPE
from tests.engine.fake_engine import FakeEngine, output
from tests.engine.hand_scheduler import make_spec

COSTS = StepCosts(step_s=0.004, stream_s=1e-4, context_s=1e-8, prompt_s=2e-5, attended_s=1e-9)
LIMITS = EngineCosts(COSTS, 4, 16, 4, 128, 1024)


def limits(**changes: object) -> EngineCosts:
    fields = {name: getattr(LIMITS, name) for name in LIMITS.__struct_fields__}
    return EngineCosts(**(fields | changes))  # type: ignore[arg-type]


def test_a_plan_is_counted() -> None:
    rows = [(0, 10, 1), (1, 20, 1), (2, 8, 4)]
    plan = StepPlan(
        step_id=0,
        scheduled=[
            ScheduledRow(row=row, num_computed_tokens=start, num_tokens=number, sample=True)
            for row, start, number in rows
        ],
    )
    assert work_of(plan).features == (1.0, 2, 30, 4, 4 * (8 + 2))


def test_the_model_learns_from_steps_what_they_cost() -> None:
    """On a CPU, where nothing is launched."""
    model, source = StepModel(LIMITS, []), random.Random(1)
    for _ in range(600):
        work = StepWork(
            num_streams=source.randrange(32),
            context_tokens=source.randrange(20_000),
            prompt_tokens=source.choice([0, 0, source.randrange(512)]),
        )
        model.observe(work, COSTS.seconds(work) * source.uniform(0.95, 1.05))
    for work in (
        StepWork(num_streams=8, context_tokens=4000),
        StepWork(num_streams=16, context_tokens=9000, prompt_tokens=200),
    ):
        assert model.costs.steps.seconds(work) == pytest.approx(COSTS.seconds(work), rel=0.1)
    assert model.costs.steps.launch_s == 0
    assert model.costs.max_num_seqs == LIMITS.max_num_seqs


def test_attention_is_learned_where_the_warm_up_has_measured_nothing() -> None:
    model, source = StepModel(LIMITS, []), random.Random(1)
    true = msgspec.structs.replace(COSTS, context_s=1e-6, attended_s=1e-7)
    for _ in range(600):
        streams = StepWork(num_streams=8, context_tokens=8 * source.randrange(2000))
        for work in (streams, prompts(1, source.randrange(32, 2000))):
            model.observe(work, true.seconds(work) * source.uniform(0.95, 1.05))
    for work in (StepWork(num_streams=8, context_tokens=16_000), prompts(1, 2000)):
        assert model.costs.steps.seconds(work) == pytest.approx(true.seconds(work), rel=0.1)


def test_the_warm_up_measures_streams_and_prompts_and_uses_what_there_is() -> None:
    """A made-up clock advances by what each step costs, and more at the first step of a kind: the
    fit finds the costs again.
    """
    now = [0.0]
    plans: list[StepPlan] = []
    seen: set[StepWork] = set()

    def execute(plan: StepPlan) -> None:
        plans.append(plan)
        work = work_of(plan)
        now[0] += COSTS.seconds(work) + (0.0 if work in seen else 1.0)
        seen.add(work)

    spec = make_spec("unused", max_num_seqs=8)
    warm_up = WarmUp(execute, spec, num_groups=2, num_blocks=80, clock=lambda: now[0])
    measured = warm_up.run()
    used = [block_id for plan in plans for new in plan.new_blocks for block_id in new.block_ids]
    assert max(used) + 1 == warm_up.num_used_blocks <= 80
    model = StepModel(LIMITS, measured)
    for work in (StepWork(num_streams=6, context_tokens=48), StepWork(prompt_tokens=12)):
        assert model.costs.steps.seconds(work) == pytest.approx(COSTS.seconds(work), rel=0.1)
    assert model.costs.steps.launch_s == 0


def test_the_warm_up_measures_what_launches_take_on_a_gpu() -> None:
    now = [0.0]
    true = StepCosts(0.005, 1e-5, 0.0, 2e-5, 0.0, launch_s=0.015)

    def execute(plan: StepPlan) -> None:
        now[0] += true.seconds(work_of(plan))

    sizes = {"max_num_seqs": 40, "max_num_batched_tokens": 8192, "max_model_len": 8192}
    spec = make_spec("unused", **sizes).model_copy(update={"device": "cuda"})
    warm_up = WarmUp(execute, spec, num_groups=1, num_blocks=9000, clock=lambda: now[0])
    steps = StepModel(LIMITS, warm_up.run()).costs.steps
    assert steps.launch_s == pytest.approx(true.launch_s)
    assert steps.prompt_s == pytest.approx(true.prompt_s, rel=0.1)


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 6])
def test_a_warm_up_needs_no_more_blocks_than_there_are(num_blocks: int) -> None:
    plans: list[StepPlan] = []
    warm_up = WarmUp(plans.append, make_spec("unused"), num_groups=2, num_blocks=num_blocks)
    warm_up.run()
    used = [block_id for plan in plans for new in plan.new_blocks for block_id in new.block_ids]
    assert all(block_id < num_blocks for block_id in used)


def test_chunks_leave_streams_the_time_that_they_are_allowed() -> None:
    decode_s = COSTS.decode_s(8, 1000)
    bounded = limits(max_itl_s=decode_s + 100 * COSTS.prompt_s + 1e-9, max_num_batched_tokens=512)
    assert bounded.chunk_tokens(8, 1000) == 100
    doubled = limits(max_slowdown=2.0, max_num_batched_tokens=4096)
    assert doubled.chunk_tokens(8, 1000) == int(decode_s / COSTS.prompt_s)
    # Without streams nobody waits; with a limit that streams alone exceed a block goes on.
    assert doubled.chunk_tokens(0, 0) == 4096
    assert limits(max_itl_s=1e-6).chunk_tokens(8, 1000) == LIMITS.block_size
    assert LIMITS.chunk_tokens(8, 1000) == LIMITS.max_num_batched_tokens - 8


def test_steps_in_graphs_take_as_long_as_their_tokens() -> None:
    steps = msgspec.structs.replace(COSTS, launch_s=0.02, graph_tokens=200)
    in_graph = StepWork(num_streams=8, prompt_tokens=192)
    launched = StepWork(num_streams=8, prompt_tokens=193)
    assert steps.seconds(in_graph) == COSTS.seconds(in_graph) < steps.launch_s
    assert steps.seconds(launched) == steps.launch_s


def test_chunks_stay_in_graphs_where_launches_take_longer_than_streams_may_wait() -> None:
    def chunk_tokens(launch_s: float, graph_tokens: int, num_streams: int = 8) -> int:
        steps = msgspec.structs.replace(COSTS, launch_s=launch_s, graph_tokens=graph_tokens)
        bounded = limits(steps=steps, max_slowdown=2.0, max_num_batched_tokens=4096)
        return bounded.chunk_tokens(num_streams, 1000)

    decode_s = COSTS.decode_s(8, 1000)
    fits = int(decode_s / COSTS.prompt_s)
    assert chunk_tokens(0.02, graph_tokens=4096) == fits
    assert chunk_tokens(0.02, graph_tokens=100) == 92
    assert chunk_tokens(decode_s * 1.9, graph_tokens=100) == fits, "launched, it is no long step"
    # Where graphs hold hardly more than the streams, what launches take is used, as without graphs.
    without = chunk_tokens(0.02, graph_tokens=0)
    assert chunk_tokens(0.02, graph_tokens=8 + LIMITS.block_size - 1) == without > fits


def test_a_prompt_beside_a_stream_is_computed_in_chunks_that_it_bears() -> None:
    costs = limits(max_itl_s=COSTS.decode_s(1, 10) + 5.5 * COSTS.prompt_s)
    engine = FakeEngine(costs=lambda: costs)
    engine.add("chat", [1, 2, 3], max_tokens=20)
    engine.step()
    engine.add("long", range(30), max_tokens=2)
    engine.add("short", [5, 4, 3, 2, 1, 0], max_tokens=3)
    plans = engine.run()
    beside = [
        sum(item.num_tokens for item in plan.scheduled if item.num_tokens > 1)
        for plan in plans
        if any(item.num_tokens == 1 for item in plan.scheduled)
    ]
    assert max(beside) == 5
    assert engine.token_ids("long") == output(list(range(30)), 2)
    assert engine.token_ids("short") == output([5, 4, 3, 2, 1, 0], 3)


DEAR_ATTENTION = StepCosts(0.004, 1e-4, 0.0, prompt_s=2e-5, attended_s=2e-8)


def chat_after(num_cached: int) -> FakeEngine:
    """Return an engine with a stream, and so many tokens ``1`` in its prefix cache."""
    costs = limits(steps=DEAR_ATTENTION, max_itl_s=0.0142, max_num_batched_tokens=512)
    engine = FakeEngine(
        costs=lambda: costs, max_num_batched_tokens=512, num_blocks=4000, max_model_len=4000
    )
    engine.add("before", [1] * num_cached, max_tokens=1)
    engine.run()
    engine.add("chat", [1, 2, 3], max_tokens=400)
    engine.step()
    return engine


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_long_prompt_attends_to_makes_its_chunks_shorter(cached: bool) -> None:
    """Computed so far, or cached: else steps would get longer and longer with it."""
    steps = DEAR_ATTENTION
    costs = limits(steps=steps, max_itl_s=0.0142, max_num_batched_tokens=512)
    engine = FakeEngine(
        costs=lambda: costs, max_num_batched_tokens=512, num_blocks=700, max_model_len=2000
    )
    if cached:
        engine.add("before", [1] * 1000, max_tokens=1)
        engine.run()
    engine.add("chat", [1, 2, 3], max_tokens=400)
    engine.step()
    assert costs.chunk_tokens(1, 3) == pytest.approx(505, abs=1)
    assert costs.chunk_tokens(1, 3, 1000) == pytest.approx(252, abs=1)
    for name in ("long", "longer"):
        engine.add(name, [1] * 1000 + [2] * 400, max_tokens=2)
        engine.add(f"short beside {name}", [3] * 40, max_tokens=1)
    took_s = [steps.seconds(work) for plan in engine.run() if (work := work_of(plan)).is_mixed]
    # The tokens of a chunk attend to each other, too.
    assert 0.9 * 0.0142 < max(took_s) < 1.3 * 0.0142
    assert engine.token_ids("long") == output([1] * 1000 + [2] * 400, 2)


def test_a_prompt_that_attends_to_much_leaves_no_time_to_another() -> None:
    """Its chunk has few tokens, and takes all the time that streams bear."""
    engine = chat_after(2000)
    engine.add("behind many", [1] * 2000 + [2] * 440, max_tokens=1)
    engine.add("beside it", [3] * 400, max_tokens=1)
    took_s = [
        DEAR_ATTENTION.seconds(work) for plan in engine.run() if (work := work_of(plan)).is_mixed
    ]
    # The tokens of a chunk attend to each other, too.
    assert 0.9 * 0.0142 < max(took_s) < 1.1 * 0.0142


def test_who_has_no_room_in_a_step_goes_before_those_who_came_later() -> None:
    """A cached prompt attends to much: beside a chunk of another one there is no room for it."""
    engine = chat_after(1000)
    engine.add("first", [3] * 400, max_tokens=1)
    engine.add("cached", [1] * 1000 + [2] * 100, max_tokens=1)
    for number in range(20):
        engine.add(f"later-{number}", [4 + number] * 500, max_tokens=1)
    engine.run()
    finished = list(engine.finished)
    assert finished[finished.index("first") :][:3] == ["first", "cached", "later-0"]


def test_a_stream_whose_blocks_were_pulled_does_not_wait_for_prompts() -> None:
    """The bound on prompts is none for the next tokens of others."""
    costs = limits(max_itl_s=1e-6)
    engine = FakeEngine(costs=lambda: costs, max_num_batched_tokens=16)
    engine.add("chat", [1, 2, 3], max_tokens=30)
    engine.step()
    engine.add("long", range(40), max_tokens=2)
    engine.step()
    engine.add("other", [6, 5], max_tokens=4, output=output([6, 5], 1))
    engine.run()
    assert list(engine.finished).index("other") < list(engine.finished).index("chat")


def test_the_report_counts_what_waits_and_what_runs() -> None:
    engine = FakeEngine(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add("chat", [1, 2, 3], max_tokens=20)
    engine.step()
    engine.add("long", range(30), max_tokens=2)
    engine.add("behind", range(10), max_tokens=2)
    engine.step()
    report = engine.scheduler.requests.figures.report(LIMITS)
    assert report.num_streams == 1
    assert report.context_tokens == 4
    assert report.waiting_tokens == 30 - 7 + 10
    assert 0 < report.free_tokens < engine.num_blocks * engine.block_size


def test_prompts_that_seem_to_cost_nothing_cost_little() -> None:
    """A step of a tiny model takes the same with a prompt as with a stream."""
    steps = [StepWork(num_streams=1, context_tokens=8), StepWork(prompt_tokens=32)]
    model = StepModel(LIMITS, [(work, 0.002) for work in steps])
    assert 0 < model.costs.steps.tokens_s(32) < 0.0002


@pytest.mark.parametrize("too_slow", [3, 10, 30])
@pytest.mark.parametrize("num_steps_between", [0, 30], ids=["prefill", "decode"])
def test_a_warm_up_on_a_busy_machine_is_forgotten(too_slow: int, num_steps_between: int) -> None:
    """By engines that compute prompts alone, too."""
    short = StepWork(prompt_tokens=32, attended_tokens=512)
    streams = StepWork(num_streams=2, context_tokens=500)
    prompt = StepWork(prompt_tokens=2000, attended_tokens=2_000_000)
    model = StepModel(LIMITS, [(work, too_slow * COSTS.seconds(work)) for work in (short, streams)])
    assert model.costs.steps.prompts_s(2000) > 2 * COSTS.prompts_s(2000)
    for _ in range(150):
        model.observe(prompt, COSTS.seconds(prompt))
        model.observe(short, COSTS.seconds(short))
        for _ in range(num_steps_between):
            model.observe(streams, COSTS.seconds(streams))
    for work in (prompt, short):
        assert model.costs.steps.seconds(work) == pytest.approx(COSTS.seconds(work), rel=0.25)


H200 = StepCosts(0.00465, 1.1e-5, 3e-8, 2e-5, 4.4e-10, launch_s=0.0155, graph_tokens=1024)
"""An 8B model."""
SHARES_8B = AttentionShares(attended=3.76e-5, context=9.4e-6)


def prompts(number: int, num_tokens: int, num_before: int = 0) -> StepWork:
    attended_tokens = number * num_tokens * (num_before + num_tokens / 2)
    return StepWork(prompt_tokens=number * num_tokens, attended_tokens=attended_tokens)


@pytest.mark.parametrize("seed", range(10))
def test_a_warm_up_beside_that_of_other_engines_makes_no_prompt_dear(seed: int) -> None:
    """Each of its steps took up to four times as long as it should. Prompts that are all alike then
    tell what others cost: attention is not made dearer where tokens are found to be cheaper.
    """
    source = random.Random(seed)
    warm_up = [prompts(1, number) for number in (32, 1024, 2048, 4096)]
    warm_up += [StepWork(num_streams=number, context_tokens=32 * number) for number in (1, 32)]
    warm_up.append(StepWork(num_streams=31, context_tokens=992, prompt_tokens=2))
    measured = [(work, source.uniform(1, 4) * H200.seconds(work)) for work in warm_up]
    costs = limits(steps=msgspec.structs.replace(COSTS, graph_tokens=1024))
    model = StepModel(costs, measured, SHARES_8B)
    streams = StepWork(num_streams=64, context_tokens=64 * 640)
    for _ in range(10):
        for work in (prompts(16, 512), *[streams] * 10):
            model.observe(work, source.uniform(0.95, 1.05) * H200.seconds(work))
    for work in (prompts(1, 8192), prompts(1, 512, num_before=16_000)):
        assert model.costs.steps.seconds(work) == pytest.approx(H200.seconds(work), rel=0.15)


def test_tokens_that_seemed_to_cost_nothing_are_soon_found_to_cost_more() -> None:
    """Another program has disturbed the streams of the warm-up, and not its prompt, which is short
    on a CPU and then took no longer than they did.
    """
    source = random.Random(1)
    true = StepCosts(0.002, 3e-4, 1e-7, 1.25e-4, 1e-8)
    warm_up = [StepWork(num_streams=number, context_tokens=32 * number) for number in (1, 8)]
    measured = [(work, 4 * true.seconds(work)) for work in warm_up]
    measured.append((prompts(1, 32), true.seconds(prompts(1, 32))))
    model = StepModel(LIMITS, measured)
    assert model.costs.steps.prompt_s < 0.1 * true.prompt_s
    for _ in range(20):
        streams = StepWork(num_streams=4, context_tokens=4 * source.randrange(100, 1500))
        for work in (prompts(1, source.randrange(100, 1000)), *[streams] * 4):
            model.observe(work, source.uniform(0.95, 1.05) * true.seconds(work))
    for num_tokens in (500, 2000):
        work = prompts(1, num_tokens)
        assert model.costs.steps.seconds(work) == pytest.approx(true.seconds(work), rel=0.2)


def test_contexts_are_found_to_be_cheap_where_launches_take_longer_than_memory() -> None:
    """Weights of a model of 0.5B are read in a tenth of the time that any step takes. Contexts that
    cost at least a share of that time would be charged to the step, and be wrong for other streams.
    """
    source = random.Random(1)
    true = StepCosts(0.0025, 1e-5, 4e-9, 2.5e-6, 3e-10)
    warm_up = [StepWork(num_streams=number, context_tokens=32 * number) for number in (1, 32)]
    measured = [(work, true.seconds(work)) for work in (*warm_up, prompts(1, 1024))]
    model = StepModel(LIMITS, measured, AttentionShares(attended=1.2e-4, context=1.7e-5))
    for number in range(1000):
        work = StepWork(num_streams=100, context_tokens=100 * (2000 + number % 500))
        model.observe(work, source.uniform(0.95, 1.05) * true.seconds(work))
    for num_streams, num_tokens in ((1, 100), (64, 2000), (128, 2500)):
        work = StepWork(num_streams=num_streams, context_tokens=num_streams * num_tokens)
        assert model.costs.steps.seconds(work) == pytest.approx(true.seconds(work), rel=0.1)


@pytest.mark.parametrize("times", [1 / 3, 3])
def test_contexts_get_slower_with_all_else_of_the_machine(times: float) -> None:
    """Streams that are all alike do not tell what has changed. Were contexts not taken to change
    with the rest, it alone would make up for them, and be wrong for other streams.
    """
    source = random.Random(1)
    streams = StepWork(num_streams=64, context_tokens=64 * 600)
    measured = [(StepWork(num_streams=number), H200.decode_s(number, 0)) for number in (1, 32)]
    model = StepModel(LIMITS, [*measured, (prompts(1, 1024), H200.prompts_s(1024))], SHARES_8B)
    for number in range(3000):
        seconds = H200.seconds(streams) * (1 if number < 1500 else times)
        model.observe(streams, source.uniform(0.95, 1.05) * seconds)
    for other in (
        StepWork(num_streams=1, context_tokens=100),
        StepWork(num_streams=128, context_tokens=128 * 2500),
    ):
        seconds = times * H200.seconds(other)
        assert model.costs.steps.seconds(other) == pytest.approx(seconds, rel=0.35)


@pytest.mark.parametrize("times", [0.5, 1, 4])
def test_what_attention_costs_is_learned_from_prompts_of_many_lengths(times: float) -> None:
    """``times``: how long it takes beside other arithmetic of its size."""
    source = random.Random(1)
    true = msgspec.structs.replace(H200, attended_s=times * SHARES_8B.attended * H200.prompt_s)
    measured = [(work, true.seconds(work)) for work in (StepWork(num_streams=1), prompts(1, 1024))]
    model = StepModel(LIMITS, measured, SHARES_8B)
    for _ in range(200):
        work = prompts(1, int(2 ** source.uniform(6, 13)))
        model.observe(work, source.uniform(0.95, 1.05) * true.seconds(work))
    for num_tokens in (500, 4000, 8192):
        work = prompts(1, num_tokens)
        assert model.costs.steps.seconds(work) == pytest.approx(true.seconds(work), rel=0.06)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1.0),
        ({"layer_windows": (None, 8, 8, 8)}, 0.25 + 0.75 / 100),
        ({"layer_windows": (None, 400, 800, 900)}, 0.875),
    ],
)
def test_the_arithmetic_of_attention_is_known_from_the_model(
    changes: dict[str, Any], share: float
) -> None:
    layer = 4 * 64 * 64 + 3 * 64 * 256
    shape = replace(
        SHAPE,
        num_layers=4,
        num_attention_heads=4,
        num_kv_heads=1,
        head_dim=16,
        hidden_size=64,
        vocab_size=1000,
        num_parameters=4 * layer + 2 * 1000 * 64 + 7 * layer,
        num_idle_parameters=7 * layer,
        layer_windows=(None,) * 4,
    )
    shares = AttentionShares.of(replace(shape, **changes), max_model_len=800)
    assert shares.attended == pytest.approx(share * 2 * 64 / layer)
    assert shares.context == pytest.approx(share * 2 * 16 / layer)


@pytest.mark.parametrize("window", [1024, 4096, 8192])
def test_contexts_up_to_a_long_window_are_learned(window: int) -> None:
    """All layers have one, as those of Mistral 7B. Streams cost more with each token until there:
    were that left out, short ones would seem to cost as much as long ones.
    """
    source = random.Random(1)
    shape = replace(SHAPE, layer_windows=(window,) * SHAPE.num_layers)
    measured = [
        (StepWork(num_streams=1), H200.decode_s(1, 0)),
        (prompts(1, 1024), H200.prompts_s(1024)),
    ]
    model = StepModel(LIMITS, measured, AttentionShares.of(shape, max_model_len=8192))
    for _ in range(500):
        num_streams, num_tokens = source.randrange(1, 65), source.randrange(window)
        work = StepWork(num_streams=num_streams, context_tokens=num_streams * num_tokens)
        model.observe(work, source.uniform(0.95, 1.05) * H200.seconds(work))
    for share in (0.05, 1):
        work = StepWork(num_streams=64, context_tokens=int(64 * share * window))
        assert model.costs.steps.seconds(work) == pytest.approx(H200.seconds(work), rel=0.1)


@pytest.mark.parametrize("seems", [0.5, 1.0, 2.0])
def test_chunks_do_not_get_smaller_because_launches_take_long(seems: float) -> None:
    """Steps with few prompt tokens take 15 ms here, as on an H200, whatever these tokens cost.

    ``seems``: what the warm-up has measured, which was disturbed.
    """
    true = StepCosts(0.005, 1e-5, 0.0, 2e-5, 0.0, launch_s=0.015)
    warm_up = [StepWork(prompt_tokens=number) for number in (32, 1000, 4000, 8000)]
    warm_up += [StepWork(num_streams=32), StepWork(num_streams=32, prompt_tokens=2)]
    costs = limits(max_num_batched_tokens=8192, max_slowdown=2.0)
    model = StepModel(costs, [(work, seems * true.seconds(work)) for work in warm_up])
    source = random.Random(1)
    for number in range(3000):
        work = StepWork(num_streams=64)
        if number % 100 == 99:
            work = StepWork(prompt_tokens=8000)
        elif number % 4:
            chunk_tokens = model.costs.chunk_tokens(64, 0)
            work = StepWork(num_streams=64, prompt_tokens=chunk_tokens)
        model.observe(work, true.seconds(work) * source.uniform(0.95, 1.3))
    least = (true.launch_s - true.decode_s(64, 0)) / true.prompt_s
    assert model.costs.chunk_tokens(64, 0) > 0.5 * least
    assert model.costs.steps.launch_s < 1.6 * true.launch_s


def test_a_disturbed_step_is_no_reason_for_long_chunks() -> None:
    """Chunks fill the time of launches: a long one would be as long as expected."""
    true = StepCosts(0.005, 1e-5, 0.0, 2e-5, 0.0, launch_s=0.015)
    warm_up = [StepWork(prompt_tokens=number) for number in (32, 1000, 4000, 8000)]
    warm_up += [StepWork(num_streams=32), StepWork(num_streams=32, prompt_tokens=2)]
    costs = limits(max_num_batched_tokens=8192, max_slowdown=2.0)
    model = StepModel(costs, [(work, true.seconds(work)) for work in warm_up])
    chunk_tokens = model.costs.chunk_tokens(64, 0)
    for seconds in (1.0, 5.0):
        model.observe(StepWork(num_streams=64, prompt_tokens=chunk_tokens), seconds)
        assert model.costs.chunk_tokens(64, 0) < 1.2 * chunk_tokens
    # A step of many tokens is as long as these.
    model.observe(StepWork(num_streams=64, prompt_tokens=8000), 0.3)
    assert model.costs.chunk_tokens(64, 0) < 1.2 * chunk_tokens


def test_steps_in_graphs_tell_what_tokens_cost_and_nothing_of_launches() -> None:
    true = StepCosts(0.005, 1e-5, 0.0, 2e-5, 0.0, launch_s=0.015, graph_tokens=1024)
    seemed = msgspec.structs.replace(true, prompt_s=4e-5)
    warm_up = [StepWork(prompt_tokens=number) for number in (32, 1000, 4000, 8000)]
    warm_up += [StepWork(num_streams=number) for number in (1, 32)]
    measured = [(work, seemed.seconds(work)) for work in warm_up]
    measured.append((StepWork(num_streams=31, prompt_tokens=2), true.launch_s))
    steps = msgspec.structs.replace(COSTS, graph_tokens=1024)
    model = StepModel(limits(steps=steps, max_slowdown=2.0), measured)
    assert model.costs.steps.launch_s == true.launch_s
    for number in range(400):
        work = StepWork(num_streams=64, prompt_tokens=100 + number % 300)
        model.observe(work, true.seconds(work))
    assert model.costs.steps.launch_s == true.launch_s
    assert model.costs.steps.prompt_s == pytest.approx(true.prompt_s, rel=0.1)


def test_launches_that_seemed_slow_are_found_to_be_fast() -> None:
    """Or a chunk would be long for streams: it is as long as launches."""
    mixed = StepWork(num_streams=8, prompt_tokens=2)
    busy = [(mixed, 0.2), (StepWork(prompt_tokens=32), 0.2)]
    model = StepModel(LIMITS, busy)
    for _ in range(100):
        model.observe(mixed, COSTS.seconds(mixed))
    assert model.costs.steps.launch_s < 0.01


def pauses_until(pauses: StreamPauses, num_streams: int) -> int:
    """Return the steps with streams before the next pause, and begin it."""
    for number in range(10_000):
        if pauses.leave_out(num_streams, num_prompt_tokens=100, chunk_tokens=10):
            pauses.ran_prompts(StreamPauses.MAX_S / 2)
            return number
        pauses.ran_streams(num_streams)
    raise AssertionError("never")


def test_few_gaps_may_be_long() -> None:
    pauses = StreamPauses(most=8)
    assert pauses_until(pauses, 4) == 0
    assert pauses.leave_out(4, 100, 10), "it goes on"
    pauses.ran_prompts(StreamPauses.MAX_S)
    assert not pauses.leave_out(4, 100, 10), "it was long enough"
    pauses.ran_streams(4)
    # Eight at once, and the last pause may be for some more than are left.
    assert pauses_until(pauses, 4) == 0
    pauses.ran_streams(4)
    assert pauses_until(pauses, 4) == 0
    pauses.ran_streams(4)
    for _ in range(3):
        assert pauses_until(pauses, 4) == pytest.approx(1 / StreamPauses.SHARE, rel=0.03)
        pauses.ran_streams(4)
    for _ in range(10_000):
        pauses.ran_streams(4)
    assert pauses.num_left == 8


def test_streams_wait_only_for_prompts_that_do_not_fit_beside_them() -> None:
    pauses = StreamPauses(most=8)
    assert not pauses.leave_out(4, num_prompt_tokens=10, chunk_tokens=10)
    assert not pauses.leave_out(0, num_prompt_tokens=100, chunk_tokens=10)
    assert not pauses.leave_out(4, num_prompt_tokens=20, chunk_tokens=10), "two chunks"
    assert pauses.leave_out(4, num_prompt_tokens=21, chunk_tokens=10)
    pauses.ran_prompts(0.0)
    assert not pauses.leave_out(4, num_prompt_tokens=0, chunk_tokens=10), "nothing is left"


def test_a_burst_is_computed_at_full_speed_until_its_gaps_are_spent() -> None:
    costs = burst_costs(tokens_in_a_pause=60)
    assert costs.pause_tokens == 48
    # Two gaps may be long, and one more as long as any part of it is left: pauses of three steps,
    # and a step of the stream after each.
    pause = [(0, 16)] * 3 + [(1, 0)]
    assert shapes_of_a_burst(costs)[:13] == [*pause, *pause, *pause, (1, 6)]


def test_no_pause_is_for_prompts_that_have_no_seat_or_are_cached() -> None:
    """A chunk has room for what can be computed now: streams go on in each step."""
    costs = limits(max_slowdown=2.0, max_num_batched_tokens=64, max_num_seqs=4)
    assert costs.chunk_tokens(3, 100) > 30
    engine = FakeEngine(
        costs=lambda: costs, max_num_batched_tokens=64, num_blocks=200, max_model_len=256
    )
    engine.add("old", range(200), max_tokens=1)
    engine.run()
    for number in range(3):
        engine.add(f"chat-{number}", [number, 2, 3], max_tokens=40)
    engine.step()
    for number in range(20):
        engine.add(f"short-{number}", [number] * 20, max_tokens=1)
    engine.add("again", [*range(196), 7, 8, 9], max_tokens=1)
    for _ in range(30):
        assert sum(item.num_tokens == 1 for item in engine.step().scheduled) >= 3
    assert "again" in engine.finished


def test_where_prompts_are_slow_no_stream_waits_for_a_full_step() -> None:
    costs = burst_costs(tokens_in_a_pause=10)
    assert costs.pause_tokens == costs.pause_chunk() == 10
    assert shapes_of_a_burst(costs)[:7] == [(0, 10), (1, 0)] * 3 + [(1, 4)]


def test_what_a_prompt_attends_to_makes_pauses_no_longer() -> None:
    steps = StepCosts(0.004, 1e-4, 0.0, prompt_s=2e-4, attended_s=1e-6)
    costs = limits(steps=steps, max_slowdown=2.0, max_num_batched_tokens=64)
    engine = FakeEngine(
        costs=lambda: costs, max_num_batched_tokens=64, num_blocks=1000, max_model_len=2000
    )
    engine.add("chat", [1, 2, 3], max_tokens=400)
    engine.step()
    engine.add("long", [5] * 1500, max_tokens=1)
    pauses_s, longest_s = [0.0], 0.0
    while "long" not in engine.finished:
        work = work_of(engine.step())
        if work.num_streams:
            pauses_s.append(0.0)
        else:
            pauses_s[-1] += steps.seconds(work)
            longest_s = max(longest_s, steps.seconds(work))
    assert StreamPauses.MAX_S < max(pauses_s) < StreamPauses.MAX_S + longest_s


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_no_step_of_a_pause_is_long_because_its_tokens_stand_behind_many(num_prompts: int) -> None:
    steps = StepCosts(0.004, 1e-4, 0.0, prompt_s=2e-4, attended_s=5e-6)
    costs = limits(steps=steps, max_slowdown=2.0, max_num_batched_tokens=256)
    engine = FakeEngine(
        costs=lambda: costs, max_num_batched_tokens=256, num_blocks=1000, max_model_len=2000
    )
    engine.add("chat", [1, 2, 3], max_tokens=1500)
    engine.step()
    for number in range(num_prompts):
        engine.add(f"long-{number}", [number] * 1500, max_tokens=1)
    pauses = []
    while f"long-{num_prompts - 1}" not in engine.finished:
        work = work_of(engine.step())
        if not work.num_streams:
            pauses.append(work)
    assert "chat" not in engine.finished
    a_token_more_s = steps.step_s + steps.tokens_s(2, 1500)
    assert max(map(steps.seconds, pauses)) < StreamPauses.MAX_S + a_token_more_s
    assert max(work.prompt_tokens for work in pauses) == costs.pause_chunk() == 256
    assert costs.pause_chunk(1400) < 50


def burst_costs(tokens_in_a_pause: int) -> EngineCosts:
    return EngineCosts(
        StepCosts(StreamPauses.MAX_S / 10, 0.0, 0.0, StreamPauses.MAX_S / tokens_in_a_pause, 0.0),
        max_num_seqs=2,
        max_num_batched_tokens=16,
        block_size=4,
        num_kv_tokens=10_000,
        kv_bytes_per_token=1,
        max_slowdown=2.0,
    )


def shapes_of_a_burst(costs: EngineCosts) -> list[tuple[int, int]]:
    """Return the streams and the prompt tokens of each step after a long prompt has come."""
    engine = FakeEngine(
        costs=lambda: costs,
        max_num_batched_tokens=costs.max_num_batched_tokens,
        num_blocks=64,
        max_model_len=256,
    )
    engine.add("chat", [1, 2, 3], max_tokens=40)
    engine.step()
    engine.add("long", range(190), max_tokens=2)
    plans = engine.run()
    assert engine.token_ids("chat") == output([1, 2, 3], 40)
    assert engine.token_ids("long") == output(list(range(190)), 2)
    return [
        (
            sum(item.num_tokens == 1 for item in plan.scheduled),
            sum(item.num_tokens for item in plan.scheduled if item.num_tokens > 1),
        )
        for plan in plans
    ]


def test_streams_go_on_when_no_prompt_has_room() -> None:
    costs = limits(max_slowdown=2.0, max_num_batched_tokens=16)
    engine = FakeEngine(costs=lambda: costs, max_num_seqs=1, max_num_batched_tokens=16)
    engine.add("chat", [1, 2, 3], max_tokens=10)
    engine.step()
    engine.add("long", range(60), max_tokens=2)
    engine.run()
    assert engine.token_ids("chat") == output([1, 2, 3], 10)
    assert engine.token_ids("long") == output(list(range(60)), 2)


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_the_setting_bounds_the_chunks_of_every_engine(role: str) -> None:
    layout = KVCacheLayout((KVCacheGroup((0,), None),), 1, 8, 4, 4)
    stated = make_spec("unused", role=role, routing={"max_itl_ms": 7.5})
    costs = limits_of(stated, layout, 32, 64)
    assert (costs.max_itl_s, costs.most_long_gaps) == (0.0075, 0)
    assert costs.steps.graph_tokens == 64
    usual = limits_of(make_spec("unused", role=role), layout, 32, 64)
    assert usual.max_itl_s is None
    assert usual.max_slowdown == (None if role == "both" else MAX_SLOWDOWN)
    assert usual.num_kv_tokens == 32 * 4


def test_a_stated_limit_has_no_exceptions() -> None:
    assert limits(max_itl_s=0.01, max_slowdown=2.0).most_long_gaps == 0
    assert limits(max_slowdown=2.0).most_long_gaps == LIMITS.max_num_seqs
