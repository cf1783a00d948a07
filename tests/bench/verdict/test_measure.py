"""Measurements of a deployment, on a fake one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pdlaunch.bench.serve import TraceRequest
from pdlaunch.bench.timed_completion import Goals, TimedCompletion
from pdlaunch.bench.verdict import measure
from pdlaunch.bench.verdict.arms import Arm
from pdlaunch.bench.verdict.measure import Launches, Load
from pdlaunch.bench.verdict.search import Step
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import PdlaunchError
from tests.bench.fake_openai import FakeOpenAI

LOAD = Load(requests=[TraceRequest(40, 6, 0.0)], probe_s=1.0)
PAIR = Arm(1, num_prefill=1, num_decode=1)
TOGETHER = Arm(1, num_both=2)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    with FakeOpenAI().in_thread() as running:

        @contextmanager
        def launched(loaded: LoadedConfig) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(url=running.url, start_s=3.0)

        monkeypatch.setattr(measure, "launched", launched)
        monkeypatch.setattr(measure, "_SETTLE_S", 0.0)
        yield running


def launches(arm: Arm, **goals: float) -> Launches:
    loaded = load_config(None, {}, {"device": "cpu"})
    found = Launches(LOAD, Goals(**goals or {"ttft_ms": 60_000}), 0.9, loaded, on_cpu=True)
    found.use(arm)
    return found


def test_single_engines_are_measured_with_prompts_that_no_cache_has(server: FakeOpenAI) -> None:
    found = launches(TOGETHER)
    assert found.start_s == 3.0
    figures = asyncio.run(found.figures(TOGETHER))
    assert [tokens for tokens, _ in figures.prefill] == [40]
    assert [batch for batch, _ in figures.steps][:2] == [1, 4]
    assert all(seconds >= 0 for _, seconds in (*figures.prefill, *figures.steps))
    assert (figures.max_batched_tokens, figures.max_num_seqs) == (512, 64)
    assert 0 < figures.chunk_tokens <= 512
    assert len({tuple(prompt) for prompt in server.prompts}) == len(server.prompts)
    assert server.most_open >= 2 * 4, "both engines have their batch"


@pytest.mark.parametrize(("kind", "is_measured"), [("pair", True), ("decode", False)])
def test_a_hand_over_is_measured_of_requests_that_were_handed_over(
    kind: str, is_measured: bool, server: FakeOpenAI
) -> None:
    server.route = f'prefill-0->decode-0; kind={kind}; reason="the pair that waits least"'
    found = launches(PAIR)
    assert (asyncio.run(found.hand_over_s(-1.0)) > 0) == is_measured


def test_a_probe_sends_the_load_and_leaves_its_first_requests_out(server: FakeOpenAI) -> None:
    found = launches(PAIR)
    server.prompts.clear()
    probe = asyncio.run(found.probe(Step(PAIR, 1, 50.0), 7))
    assert len(server.prompts) == 50
    assert probe.met == [True] * 40
    assert (probe.row.num_errors, probe.row.request_rate, probe.limit) == (0, 50.0, "")
    sent = {tuple(prompt) for prompt in server.prompts}
    assert sent == {tuple(prompt) for prompt in LOAD.prompts(50, 7)}


def test_a_step_is_timed_though_tokens_arrive_several_at_once() -> None:
    tokens_at = [0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.6]
    done = [TimedCompletion(start_at=0.0, tokens_at=tokens_at)] * 2
    assert measure._common_step_s(done) == pytest.approx(0.1, rel=0.3)


def test_a_hopeless_probe_ends_early(server: FakeOpenAI) -> None:
    found = launches(TOGETHER, e2e_ms=1e-6)
    probe = asyncio.run(found.probe(Step(TOGETHER, 1, 50.0), 0))
    assert not any(probe.met)
    assert len(probe.met) < 40, "of 40 that count"
    assert probe.limit == "prefill beside streams"


def test_prompts_of_single_engines_leave_room_for_their_answers(server: FakeOpenAI) -> None:
    server.max_model_len = 46
    found = launches(PAIR)
    asyncio.run(found.hand_over_s(0.0))
    asyncio.run(found.figures(TOGETHER))
    lengths = {len(prompt) for prompt in server.prompts}
    assert lengths >= {40, 46 - 16, 46 // 2}, "a token, sixteen, more than there is room for"
    assert max(lengths) == 40


def test_a_deployment_that_answers_nothing_is_no_measurement(server: FakeOpenAI) -> None:
    found = launches(TOGETHER)
    server.refusals = [(500, b"broken")] * 50
    with pytest.raises(PdlaunchError, match="no request was answered: HTTP 500: broken"):
        asyncio.run(found.probe(Step(TOGETHER, 1, 50.0), 0))
    server.refusals.clear()
    server.refuses_after = 0
    probe = asyncio.run(found.probe(Step(TOGETHER, 1, 50.0), 0))
    assert not any(probe.met)
    assert probe.limit == "full queues", "an arm that is full works"
    with pytest.raises(PdlaunchError, match="failed: HTTP 429"):
        found.use(PAIR)


def test_an_arm_runs_until_another_is_used(server: FakeOpenAI) -> None:
    found = launches(TOGETHER)
    for arm in (TOGETHER, PAIR, TOGETHER):
        found.use(arm)
    assert len(server.prompts) == 3 * 4, "a warm-up for each start"
