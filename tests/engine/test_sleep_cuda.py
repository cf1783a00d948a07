"""A runner that sleeps: memory by the driver's own count, and the same tokens after each level."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from pdlaunch.engine.memory.pools import KV_CACHE, TAGS, WEIGHTS, CuMemPools
from pdlaunch.engine.runner import ModelRunner
from tests.engine.models.tiny import COMMON, save_tiny_model
from tests.engine.real_steps import answers, ignore_progress, make_spec

pytest.importorskip("cuda.bindings")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KV_BYTES = 1024**3


def answers_of(runner: ModelRunner) -> list[list[int]]:
    rng = random.Random(3)
    prompts = [
        [rng.randrange(int(str(COMMON["vocab_size"]))) for _ in range(length)]
        for length in (5, 17, 40)
    ]
    return answers(runner, prompts, 12, step_tokens=16)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3"])
@pytest.mark.parametrize(
    ("load_format", "enforce_eager"), [("auto", False), ("dummy", False), ("auto", True)]
)
def test_tokens_are_the_same_after_each_of_ten_cycles(
    name: str, load_format: str, enforce_eager: bool, tmp_path: Path, pools: CuMemPools
) -> None:
    """CUDA graphs are captured once: what they read and write is at the same addresses after each
    cycle.
    """
    directory = save_tiny_model(name, tmp_path)
    spec = make_spec(
        directory,
        device="cuda",
        device_indices=(0,),
        enable_cumem_allocator=True,
        kv_cache_memory=KV_BYTES,
        load_format=load_format,
        enforce_eager=enforce_eager,
    )
    runner = ModelRunner(spec, tp=None, progress=ignore_progress, pools=pools)
    runner.warm_up()
    before, address = answers_of(runner), runner.kv_cache.data_ptr()
    pool_bytes = pools.num_bytes()
    free_asleep, free_awake = [], []
    for level in (1, 2) * 5:
        torch.cuda.synchronize()
        free_bytes = torch.cuda.mem_get_info()[0]
        assert runner.sleep(level) == pool_bytes
        free_asleep.append(torch.cuda.mem_get_info()[0])
        assert free_asleep[-1] - free_bytes >= 0.95 * pool_bytes
        assert runner.sleeping_tags == {WEIGHTS, KV_CACHE}
        runner.wake_up([WEIGHTS])
        assert runner.sleeping_tags == {KV_CACHE}
        runner.wake_up(TAGS)
        assert int(runner.kv_cache.count_nonzero()) == 0
        assert answers_of(runner) == before
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free_awake.append(torch.cuda.mem_get_info()[0])
    assert runner.kv_cache.data_ptr() == address
    # The first cycles bring kernels that are loaded when they are first used.
    assert len(set(free_asleep[4:])) == 1
    assert len(set(free_awake[4:])) == 1
