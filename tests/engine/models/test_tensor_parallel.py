"""Ranks in processes of their own answer as one rank does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pdlaunch.config.model_files.shape import ModelShape, read_model_shape
from pdlaunch.engine.models.tensor_parallel import (
    Shard,
    TPGroup,
    plan_cuts,
    says_that_a_rank_is_gone,
)
from pdlaunch.errors import ConfigError, StartupError, UnsupportedModelError
from tests.engine.models.tiny import greedy, save_tiny_model
from tests.engine.real_steps import GRAPHS

NUM_TOKENS = 6
# From each family, the model with more to split: biases, windows.
FAMILIES = ["llama-bias", "qwen2-window", "qwen3", "mistral", "gemma3", "smollm3-window"]
ROOT = Path(__file__).parents[3]


def run_group(
    folder: Path,
    tp_size: int,
    directories: list[Path],
    prompts: list[list[int]],
    num_tokens: int = NUM_TOKENS,
    **spec: object,
) -> list[dict[str, Any]]:
    """Run the ranks; return what each has computed."""
    arguments = {
        "rendezvous": f"file://{folder}/rendezvous-{tp_size}",
        "tp_size": tp_size,
        "directories": [str(directory) for directory in directories],
        "prompts": prompts,
        "num_tokens": num_tokens,
        "spec": spec,
    }
    command = [sys.executable, "-m", "tests.engine.models.tp_worker"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps(arguments | {"tp_rank": tp_rank})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for tp_rank in range(tp_size)
    ]
    try:
        ended = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * tp_size, ended
    results = [json.loads(out) for out, _ in ended]
    for result in results:
        assert result["broadcast"] == bytes(range(16)).hex()
        assert result["least"] == 2**40 + 8 - tp_size
        assert set(result["listening"]) <= {"127.0.0.1"}
    return results


@pytest.mark.parametrize(
    ("tp_size", "names", "sizes"),
    [
        (2, FAMILIES, {}),
        (3, ["llama-bias", "gemma3"], {"num_key_value_heads": 3, "intermediate_size": 96}),
    ],
    ids=["2", "3"],
)
@pytest.mark.processes
def test_ranks_answer_as_generate_does(
    tmp_path: Path, tp_size: int, names: list[str], sizes: dict[str, int]
) -> None:
    """Biases, a KV head on all ranks (llama-bias has one), tied embeddings, query norms, windows,
    layers without rotation. Three ranks cut otherwise, whatever the model: a few will do.
    """
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in (9, 26)]
    directories = [save_tiny_model(name, tmp_path, **sizes) for name in names]
    # Three ranks on two cores take turns at every sum: fewer steps.
    num_tokens, is_async = (NUM_TOKENS, True) if tp_size == 2 else (3, False)
    results = run_group(
        tmp_path, tp_size, directories, prompts, num_tokens, async_scheduling=is_async
    )
    assert all(result["listening"] for result in results)
    for directory in directories:
        answers = [result["answers"][str(directory)] for result in results]
        expected = greedy(directory, prompts, num_tokens)
        runs = [expected] * (1 + is_async)
        assert [answer["tokens"] for answer in answers] == [runs] * tp_size, directory.name
        shape = read_model_shape(directory)
        assert all(answer["num_parameters"] < 0.75 * shape.num_parameters for answer in answers)
        first_heads = range(tp_size) if shape.num_kv_heads == tp_size else [0] * tp_size
        assert [answer["heads"] for answer in answers] == [[first, 1] for first in first_heads]
        assert len({answer["digest"] for answer in answers}) == 1


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("changes", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.processes
def test_two_gpus_answer_as_generate_does(tmp_path: Path, changes: dict[str, object]) -> None:
    """Sums over the ranks inside of CUDA graphs, between prompts that are computed without."""
    prompts = [[5 + length % 90] * length for length in (1, 4, 9, 15, 26, 33)]
    directories = [save_tiny_model(name, tmp_path) for name in ("llama-bias", "qwen3", "gemma3")]
    spec = {"device": "cuda", "device_indices": [0, 1], "async_scheduling": True, **changes}
    results = run_group(tmp_path, 2, directories, prompts, **spec)
    for directory in directories:
        answers = [result["answers"][str(directory)] for result in results]
        expected = greedy(directory, prompts, NUM_TOKENS)
        assert [answer["tokens"] for answer in answers] == [[expected] * 2] * 2
        assert [answer["has_graphs"] for answer in answers] == ["enforce_eager" not in changes] * 2


def make_shape(**changes: int) -> ModelShape:
    sizes = {
        "num_layers": 1,
        "num_attention_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "vocab_size": 9,
        "max_position_embeddings": 9,
        "layer_weights": {},
        "other_weights": {},
    }
    return ModelShape(
        **(sizes | changes),
        architecture="",
        model_type="llama",
        layer_windows=(None,),
        dtype=None,
        tie_word_embeddings=True,
        eos_token_ids=(),
    )


@pytest.mark.parametrize(
    ("tp_size", "expected"),
    [
        (1, [(0, 4)]),
        (2, [(0, 2), (2, 2)]),
        (4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (12, [(rank // 3, 1) for rank in range(12)]),
    ],
)
def test_kv_heads_of_each_rank(tp_size: int, expected: list[tuple[int, int]]) -> None:
    shards = [Shard(tp_rank, tp_size, make_shape()) for tp_rank in range(tp_size)]
    assert [(shard.first_kv_head, shard.num_kv_heads) for shard in shards] == expected
    # Each rank's query heads belong to its KV heads.
    for shard in shards:
        first, num_heads = shard.tp_rank * shard.num_attention_heads, shard.num_attention_heads
        owners = {head // 3 for head in range(first, first + num_heads)}
        assert owners == set(range(shard.first_kv_head, shard.first_kv_head + shard.num_kv_heads))
        share = slice(2 * shard.first_kv_head, 2 * max(owners) + 2)
        assert shard.share("model.layers.0.self_attn.k_proj", 8) == share


@pytest.mark.parametrize(
    ("changes", "tp_size", "name"),
    [
        ({}, 5, "num_attention_heads"),
        ({"num_kv_heads": 6}, 4, "num_key_value_heads"),
        ({"intermediate_size": 49}, 2, "intermediate"),
    ],
)
def test_what_cannot_be_divided_is_named(changes: dict[str, int], tp_size: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Shard(0, tp_size, make_shape(**changes))
    assert caught.value.field == "tensor_parallel_size"


@pytest.mark.parametrize(
    ("plan", "message"),
    [({"gate": "packed_colwise"}, r"model\.gate \(packed_colwise\)"), (None, "no tensor-parallel")],
)
def test_models_that_cannot_be_cut_are_refused(plan: dict[str, str] | None, message: str) -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"gate": torch.nn.Linear(24, 48)})})
    with pytest.raises(UnsupportedModelError, match=message):
        plan_cuts(model, "model", plan, Shard(0, 2, make_shape()))


@pytest.mark.processes
def test_a_rank_that_dies_is_told_from_other_failures(tmp_path: Path) -> None:
    code = f"""
import os, sys, torch
from pdlaunch.engine.models.tensor_parallel import TPGroup, says_that_a_rank_is_gone
group = TPGroup("file://{tmp_path}/rendezvous", int(sys.argv[1]), 2, "cpu")
group.least(1)
if sys.argv[1] == "1":
    os._exit(0)
try:
    group.least(1)
    group.least(1)
except RuntimeError as error:
    print(says_that_a_rank_is_gone(error), flush=True)
os._exit(0)
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [rank.communicate(timeout=500)[0] for rank in ranks] == ["True\n", ""]
    assert not says_that_a_rank_is_gone(RuntimeError("out of memory"))


def test_missing_rank_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="tp_rank 0 of 2"):
        TPGroup(f"file://{tmp_path}/rendezvous", 0, 2, "cpu", timeout_s=0.5)
