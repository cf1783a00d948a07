"""Pairs of vLLM that serve models of other shapes than the demo model, each tiny and random, or
split the KV heads between other numbers of ranks.

Tokens are those of one engine alone, KV blocks really move, and a bit that flips in the blocks of
any KV cache group is noticed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoConfig

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete
from tests.e2e.tiny_models import VOCAB_SIZE, write_model
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import flip_bit
from tests.vllm.test_verified import Pair

NUM_TOKENS = 12
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Model:
    family: str
    shape: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    num_groups: int = 1  # of KV caches in which bits are flipped; 0 where ranks share them

    def written(self, folder: Path) -> Path:
        config = AutoConfig.for_model(self.family, **{**SIZES, **self.shape})
        return write_model(config, folder / self.family)


WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MODELS = {
    "Qwen3": Model("qwen3"),
    "Gemma 3": Model(
        "gemma3_text",
        {"num_hidden_layers": 6, "layer_types": WINDOWS, "sliding_window": 70},
        num_groups=3,
    ),
    "Qwen3 MoE": Model("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    # vLLM's kernels for a CPU keep no state in the middle of a prompt, so that it finds no prefix.
    "Falcon H1": Model(
        "falcon_h1",
        {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        {"enable_prefix_caching": False},
        num_groups=2,
    ),
    "8-bit KV": Model("llama", settings={"engine_args": {"kv-cache-dtype": "fp8"}}),
    "TP 1 and 2": Model("llama", settings={"decode": {"tensor_parallel_size": 2}}),
    "TP 2 and 1": Model("llama", settings={"prefill": {"tensor_parallel_size": 2}}, num_groups=0),
    "DP 2": Model(
        "qwen3_moe",
        {"num_experts": 4, **EXPERTS},
        {"data_parallel_size": 2, "engine_args": {"enable-expert-parallel": True}},
        num_groups=0,
    ),
}
SHORT = ("Gemma 3", "Falcon H1")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in SHORT else pytest.mark.vllm_long) for name in MODELS
    ],
)
def launch(
    request: pytest.FixtureRequest, vllm_command: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Deployment]]:
    model = MODELS[request.param]
    folder = tmp_path_factory.mktemp("models")
    settings = {"model": str(model.written(folder)), "dtype": "float32", **model.settings}
    with running_engines(folder, vllm_command, settings) as deployment:
        yield model, deployment


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


def test_tokens_are_those_of_one_engine_and_kv_bytes_have_moved(
    launch: tuple[Model, Deployment],
) -> None:
    """Prompts shorter and longer than windows, that fill their last block and do not."""
    _, deployment = launch
    pair, told = Pair(deployment), []
    for seed, num_tokens in enumerate((40, 128, 301, 333)):
        prompt = prompt_of(seed, num_tokens)
        num_bytes, _ = pair.counts()
        told.append(complete(deployment.url, prompt, NUM_TOKENS))
        assert pair.counts()[0] > num_bytes
        assert told[-1] == complete(pair.prefill, prompt, NUM_TOKENS)
    assert len(set(map(tuple, told))) == len(told), "KV blocks of another prompt would not show"
    assert pair.counts()[1] == 0
    assert Api(deployment.url).metrics()["pdlaunch_router_silent_recomputes_total"] == 0


def test_a_bit_that_flips_in_any_group_changes_no_token(launch: tuple[Model, Deployment]) -> None:
    model, deployment = launch
    pair = Pair(deployment)
    log = (deployment.log_dir / "prefill-0.log").read_text()
    for group in range(model.num_groups):
        prompt = prompt_of(100 + group, 300)
        expected = complete(pair.prefill, prompt, NUM_TOKENS)
        params = pair.hand_over(prompt)
        time.sleep(0.5)  # the lease is granted, and its blocks hashed, in the step after the answer
        assert len(params["remote_block_ids"]) == model.num_groups
        flip_bit(params, pair.worker("prefill-0"), log, -1, group=group)
        _, num_failed = pair.counts()
        assert pair.take(prompt, params) == expected
        assert pair.counts()[1] == num_failed + 1
