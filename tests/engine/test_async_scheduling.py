"""The step loop with ``async_scheduling``: the same tokens as without, from a real model."""

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.leader import Leader, RankParts
from pdlaunch.engine.rows import new_row
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.sampler import draw_tokens
from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.engine import (
    AbortRequest,
    AddRequest,
    RequestFinished,
    SamplingParams,
    Tokens,
    ToRank,
)
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.fake_engine import make_scheduler
from tests.engine.models.tiny import save_tiny_model
from tests.engine.real_steps import GRAPHS, ignore_progress, make_spec
from tests.engine.test_leader import Recorder

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class CountingRunner(ModelRunner):
    num_running = num_ahead = 0

    def launch(self, plan: StepPlan) -> Any:
        self.num_ahead += bool(plan.scheduled and self.num_running)
        self.num_running += bool(plan.scheduled)
        return super().launch(plan)

    def collect(self, step: Any) -> list[TokenOutput | None]:
        self.num_running -= 1
        return super().collect(step)


class Engine:
    """A leader with a real model; the server's messages come at the turns that the test says."""

    def __init__(self, spec: EngineSpec) -> None:
        self.runner = CountingRunner(spec, tp=None, progress=ignore_progress)
        self.runner.warm_up()
        self.runner.num_ahead = self.runner.num_running = 0
        groups, num_blocks = self.runner.layout.groups, min(60, self.runner.num_blocks)
        grammars = self.runner.grammars
        self.scheduler = make_scheduler(spec, groups, num_blocks, grammars=grammars)
        self.server: Any = Recorder()
        self.leader = Leader(RankParts(spec, self.runner, self.server), self.scheduler, self.server)

    def run(self, arrivals: dict[int, list[ToRank]]) -> dict[str, tuple[str, list[TokenOutput]]]:
        """``arrivals`` by turn. Returns how each request ended, and its tokens."""
        turn = 0
        while arrivals.keys() - set(range(turn)) or self.leader.wait_s() == 0:
            self.server.requests = arrivals.get(turn, [])
            self.leader.turn()
            self.scheduler.requests.check_integrity()
            turn += 1
        tokens: dict[str, list[TokenOutput]] = {}
        reasons: dict[str, str] = {}
        for item in self.server.told:
            if isinstance(item, Tokens | RequestFinished):
                assert item.request_id not in reasons
                tokens.setdefault(item.request_id, []).extend(item.tokens)
            if isinstance(item, RequestFinished):
                reasons[item.request_id] = item.reason
        return {request_id: (reasons[request_id], tokens[request_id]) for request_id in reasons}


def random_requests(seed: int) -> dict[int, list[ToRank]]:
    """Of every kind, some of which stop early or are aborted, at random turns."""
    draw = random.Random(seed)
    arrivals: dict[int, list[ToRank]] = {}
    stem = [draw.randrange(3, 199) for _ in range(20)]
    for index in range(12):
        tail = [draw.randrange(3, 199) for _ in range(draw.randrange(1, 9))]
        sampling = SamplingParams(
            max_tokens=draw.choice([1, 5, 25, 35]),
            temperature=draw.choice([0.0, 0.0, 0.8, 1.3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 0, 30]),
            min_p=draw.choice([0.0, 0.05]),
            min_tokens=draw.choice([0, 4]),
            logit_bias=draw.choice([{}, {}, {7: 2.0}]),
            repetition_penalty=draw.choice([1.0] * 15 + [1.2]),
            stop_token_ids=tuple(draw.sample(range(199), draw.choice([0, 10]))),
            seed=draw.getrandbits(64),
            num_top_logprobs=draw.choice([None, None, 0, 3]),
        )
        message = AddRequest(
            request_id=f"request-{index}/0",
            prompt_token_ids=stem[: draw.randrange(20)] + tail,
            sampling=sampling,
            do_remote_decode=draw.random() < 0.2,
        )
        turn = draw.randrange(15)
        arrivals.setdefault(turn, []).append(message)
        if index % 5 == 4:
            turn += draw.randrange(1, 8)
            arrivals.setdefault(turn, []).append(AbortRequest(request_id=message.request_id))
    return arrivals


def token_ids(tokens: list[TokenOutput]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize(
    ("name", "seeds", "changes"),
    [
        ("llama", (0, 1), {}),
        ("gemma3", (2,), {}),
        *(
            pytest.param(
                name, (1,), {"device": "cuda", "device_indices": (0,)} | graphs, marks=NEEDS_CUDA
            )
            for name in ("llama", "gemma3")
            for graphs in GRAPHS.values()
        ),
    ],
)
def test_tokens_do_not_depend_on_running_ahead(
    name: str, seeds: tuple[int, ...], changes: dict[str, object], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    directory = save_tiny_model(name, tmp_path)
    for seed in seeds:
        answers = []
        for async_scheduling in (False, True):
            spec = make_spec(
                directory, async_scheduling=async_scheduling, max_num_seqs=5, **changes
            )
            engine = Engine(spec)
            answers.append(engine.run(random_requests(seed)))
            assert (engine.runner.num_ahead > 5) == async_scheduling
        alone, ahead = answers
        assert alone.keys() == ahead.keys()
        for request_id, (reason, tokens) in alone.items():
            other_reason, others = ahead[request_id]
            if "abort" in (reason, other_reason):
                # An abort meets the request after another number of tokens.
                num_both = min(len(tokens), len(others))
                assert token_ids(tokens)[:num_both] == token_ids(others)[:num_both]
                continue
            assert (other_reason, token_ids(others)) == (reason, token_ids(tokens))
            for one, other in zip(others, tokens, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_drawing_on_a_gpu_makes_nobody_wait() -> None:
    """But for penalties; and draws what the CPU draws."""
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(3)) * 3
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.8, "num_top_logprobs": 2},
        {"temperature": 1.1, "top_k": 20},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {5: 3.0}},
        {"temperature": 0.7, "min_tokens": 9, "eos_token_ids": (4,), "num_top_logprobs": 0},
        {"temperature": 0.0, "min_tokens": 9},
        {"temperature": 1e-9, "logit_bias": dict.fromkeys(range(500), -100.0)},
        {"temperature": 1.0},
        {"temperature": 1.0, "num_top_logprobs": 1},
    ]
    logits[7, 9] = math.nan
    logits[8, 9] = math.inf
    params = [SamplingParams(max_tokens=9, seed=index, **kind) for index, kind in enumerate(kinds)]
    rows = [new_row(np.zeros(4, np.int64), [1, 2, 3], 2, sampling) for sampling in params]
    expected = draw_tokens(logits, rows).collect()
    on_device = logits.cuda()
    draw_tokens(on_device, rows).collect()
    with refuse_waiting():
        drawn = draw_tokens(on_device, rows)
    assert expected[7] is None
    for one, other in zip(drawn.collect(), expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [best for best, _ in one.top_logprobs] == [best for best, _ in other.top_logprobs]


@contextmanager
def refuse_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
