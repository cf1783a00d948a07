"""Pairs of vLLM on GPUs: tiny random models of several shapes, every path, sleep. Without a second
GPU both engines share one.
"""

import importlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdlaunch.launch.client.api import command_engines
from tests.e2e.api import await_ready, complete
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.waiting import await_true
from tests.mooncake import mooncake_problem
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import FAILED, total
from tests.vllm.test_models import HYBRID, MODELS, NUM_TOKENS, distance, first_token, prompt_of
from tests.vllm.test_other_paths import LOADED
from tests.vllm.test_verified import Pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm_long,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KV_BYTES = 2**30
SETTINGS: dict[str, object] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory": KV_BYTES,
}
SHAPES = {
    name: MODELS[name] for name in ("Qwen3", "Gemma 3", "Qwen3 MoE", "DeepSeek V2", "Falcon H1")
} | {"Qwen3 Next": HYBRID}
# Sizes that vLLM has kernels for on a GPU
LATENT = {"qk_nope_head_dim": 128, "v_head_dim": 128}
SHAPES["DeepSeek V2"] = replace(
    SHAPES["DeepSeek V2"], shape={**SHAPES["DeepSeek V2"].shape, **LATENT}
)
ENGINE_ARGS = {"Qwen3 Next": {"additional-config": {"gdn_prefill_backend": "triton"}}}
LLAMA = MODELS["8-bit KV"]
PATHS: dict[str, dict[str, object]] = {
    "p2p/": {"nixl": {"path": "p2p"}},
    "nixl/": {"nixl": {"path": "nixl"}},
    "file/": {"connector": "file"},
    "mooncake/": {"connector": "mooncake"},
}


def check_answers(deployment: Deployment, first_seed: int) -> None:
    """Decode goes on with prefill's KV blocks as prefill itself does. Both compute in bfloat16, so
    log probabilities are compared.
    """
    pair, told, alone = Pair(deployment), [], []
    for seed, num_tokens in enumerate((40, 128, 301, 333), first_seed):
        prompt = prompt_of(seed, num_tokens)
        num_bytes, _ = pair.counts()
        told.append(first_token(pair.decode, prompt, kv_transfer_params=pair.hand_over(prompt)))
        assert pair.counts()[0] > num_bytes
        alone.append(first_token(pair.prefill, prompt, cache_salt="alone"))
    apart = [distance(*each) for each in zip(told, alone, strict=True)]
    others = [distance(one, other) for one, other in itertools.pairwise(told)]
    assert max(apart) < 0.1
    assert min(others) > 0.5, "KV blocks of another prompt would not show"
    assert len(complete(deployment.url, prompt_of(first_seed + 9, 300), NUM_TOKENS)) == NUM_TOKENS
    metrics = Api(deployment.url).metrics()
    assert total(metrics, FAILED) == 0
    assert metrics["pdlaunch_router_silent_recomputes_total"] == 0


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["TP 1 and 2", "TP 2 and 1", "PP 2"])
def test_ranks(name: str, vllm_command: str, tmp_path: Path) -> None:
    settings = SETTINGS | MODELS[name].settings | {"model": str(MODELS[name].written(tmp_path))}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        check_answers(deployment, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_models(name: str, vllm_command: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"model": str(SHAPES[name].written(tmp_path))}
    settings |= {"engine_args": ENGINE_ARGS.get(name, {})}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        check_answers(deployment, 0)


@pytest.mark.parametrize("cumem", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str, cumem: bool, vllm_command: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"model": str(LLAMA.written(tmp_path))}
    settings |= {"kv_transfer": PATHS[path], "enable_cumem_allocator": cumem}
    if path == "file/":
        settings["kv_transfer"] = {"connector": "file", "file": {"directory": str(tmp_path / "kv")}}
    if path == "mooncake/":
        if problem := mooncake_problem():
            pytest.skip(f"mooncake: {problem}")
        (tmp_path / "mooncake").symlink_to(importlib.import_module("mooncake").__path__[0])
        settings["env"] = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        check_answers(deployment, 20)
        (pair,) = admin_api(deployment.url).get_object("/pdlaunch/status")[1]["pairs"]
        assert pair["path"].startswith(path)
        assert pair["gigabytes_per_s"] > 0


def test_a_host_tier_gives_blocks_back(vllm_command: str, tmp_path: Path) -> None:
    """Each prompt drives the ones before it out of the KV caches."""
    tier = {"num-gpu-blocks-override": 100, "kv-offloading-size": 0.25}
    settings = SETTINGS | {"model": str(LLAMA.written(tmp_path)), "engine_args": tier}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        check_answers(deployment, 0)
        pair = Pair(deployment)
        for _ in range(2):
            loaded, num_bytes = pair.prefill.metrics().get(LOADED, 0.0), pair.counts()[0]
            check_answers(deployment, 0)
            for seed in range(100, 106):
                complete(deployment.url, prompt_of(seed, 300), NUM_TOKENS)
            assert pair.counts()[0] > num_bytes, "decode has blocks from prefill"
        assert pair.prefill.metrics()[LOADED] > loaded, "prefill has blocks back from the host"


def test_engines_sleep_and_wake_up(vllm_command: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"model": str(LLAMA.written(tmp_path))}
    settings |= {"enable_sleep_mode": True}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        check_answers(deployment, 40)
        admin = admin_api(deployment.url)
        for cycle in range(3):
            num_bytes = free_bytes()
            outcomes = command_engines(admin, "/sleep", level=1, mode="wait")
            assert [(each.is_sleeping, each.error) for each in outcomes] == [(True, None)] * 2
            await_true(
                lambda awake=num_bytes: free_bytes() - awake > 1.9 * KV_BYTES,
                "the KV caches are given back",
                30.0,
            )
            assert not any(each.error for each in command_engines(admin, "/wake_up"))
            await_ready(deployment.url)
            check_answers(deployment, 60 + 20 * cycle)


def free_bytes() -> int:
    """Return the free memory of all devices."""
    return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
