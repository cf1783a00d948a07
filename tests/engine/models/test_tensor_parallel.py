"""The ranks of a group answer as one rank does."""

import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
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
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.errors import ConfigError, StartupError, UnsupportedModelError
from tests.engine.models.tiny import greedy, save_tiny_model
from tests.engine.real_steps import answers, ignore_progress, make_spec

NUM_TOKENS = 6
TIMEOUT_S = 300
# From each family, the model with more to split: biases, windows.
FAMILIES = ["llama-bias", "qwen2-window", "qwen3", "mistral", "gemma3", "smollm3-window"]
THREE = ["llama-bias", "gemma3"]


class ThreadGroup(TPGroup):
    """The group of ranks that are threads of this process; runners are made one after another."""

    def __init__(self, tp_rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.tp_rank, self.tp_size = tp_rank, len(given)
        self._given, self._barrier = given, barrier

    def exchange(self, own: Any) -> list[Any]:
        """Return what all ranks have passed."""
        self._given[self.tp_rank] = own
        self._barrier.wait(TIMEOUT_S)
        given = [*self._given]
        self._barrier.wait(TIMEOUT_S)
        return given

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.exchange(tensor.clone())))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self.exchange(tensor.clone())[0])

    def least(self, number: int) -> int:
        return number


@pytest.mark.parametrize(
    ("tp_size", "name", "sizes"),
    [
        *((2, name, {}) for name in FAMILIES),
        # Three ranks cut otherwise, whatever the model: a few will do.
        *((3, name, {"num_key_value_heads": 3, "intermediate_size": 96}) for name in THREE),
    ],
)
def test_ranks_answer_as_generate_does(
    tmp_path: Path, tp_size: int, name: str, sizes: dict[str, int]
) -> None:
    """Biases, a KV head on all ranks (llama-bias has one), tied embeddings, query norms, windows,
    layers without rotation.
    """
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in (9, 26)]
    directory = save_tiny_model(name, tmp_path, **sizes)
    spec = make_spec(directory, tensor_parallel_size=tp_size, async_scheduling=True)
    given, barrier = [None] * tp_size, threading.Barrier(tp_size)
    groups = [ThreadGroup(tp_rank, given, barrier) for tp_rank in range(tp_size)]
    runners = [ModelRunner(spec, tp=tp, progress=ignore_progress) for tp in groups]

    def answer(tp_rank: int, ahead: bool) -> list[list[int]]:
        try:
            return answers(
                runners[tp_rank],
                prompts,
                NUM_TOKENS,
                step_tokens=19,
                apart=1,
                ahead=ahead,
                share=lambda tokens: groups[tp_rank].exchange(tokens)[0],
            )
        except BaseException:
            barrier.abort()
            raise

    expected = greedy(directory, prompts, NUM_TOKENS)
    for ahead in (False, True):
        with ThreadPoolExecutor(tp_size) as pool:
            found = [*pool.map(answer, range(tp_size), [ahead] * tp_size)]
        assert found == [expected] * tp_size
    shape = read_model_shape(directory)
    first_heads = range(tp_size) if shape.num_kv_heads == tp_size else [0] * tp_size
    for runner, first_head in zip(runners, first_heads, strict=True):
        num_parameters = sum(each.numel() for each in runner._model.parameters())
        assert num_parameters < 0.75 * shape.num_parameters
        assert (runner.first_kv_head, runner.layout.num_kv_heads) == (first_head, 1)
    assert len({runner.model_digest for runner in runners}) == 1


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
