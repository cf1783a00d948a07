"""Tokens of the runner equal those of transformers' generate, in float32 at temperature 0."""

import random
from collections.abc import Collection
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pdlaunch.config.model_files.weights import weight_digests
from pdlaunch.engine.memory.pools import TAGS, MemoryPools
from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.engine.runner import ModelRunner, left_for_cache
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.models.tiny import CONFIGS, greedy, save_tiny_model
from tests.engine.real_steps import BLOCK_SIZE, GRAPHS, answers, ignore_progress, make_spec

NUM_TOKENS = 14
# Around the block (4), the chunks (7), and the windows (8, 10).
LENGTHS = [1, 3, 4, 5, 7, 8, 9, 10, 11, 16, 17, 33]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list, list]:
    directory = save_tiny_model(request.param, tmp_path_factory.mktemp("models"))
    draw = random.Random(7)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in LENGTHS]
    return directory, prompts, greedy(directory, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def runner(model: tuple[Path, list, list]) -> ModelRunner:
    return new_runner(model[0])


def new_runner(directory: Path, tp: TPGroup | None = None, **changes: object) -> ModelRunner:
    return ModelRunner(make_spec(directory, **changes), tp=tp, progress=ignore_progress)


@pytest.mark.parametrize(("step_tokens", "apart"), [(64, 0), (19, 0), (19, 2), (5, 1)])
def test_batched_and_chunked_equals_generate(
    model: tuple[Path, list, list], runner: ModelRunner, step_tokens: int, apart: int
) -> None:
    _, prompts, expected = model
    found = answers(runner, prompts, NUM_TOKENS, step_tokens=step_tokens, apart=apart)
    assert found == expected
    tokens = {token for answer in expected for token in answer}
    assert len(tokens) > 20, "a model that repeats one token proves nothing"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def plan_of(
    known: list[int], block_ids: list[int], num_computed: int = 0, *, sample: bool = True
) -> StepPlan:
    """A plan that adds a row of one group and computes the rest of what it knows."""
    new = NewRow(
        row=0, request_id="a", token_ids=known, num_prompt_tokens=len(known), sampling=GREEDY
    )
    blocks = NewBlocks(row=0, group=0, first_block_index=0, block_ids=block_ids)
    num_tokens = len(known) - num_computed
    computed = ScheduledRow(
        row=0, num_computed_tokens=num_computed, num_tokens=num_tokens, sample=sample
    )
    return StepPlan(step_id=0, new_rows=[new], new_blocks=[blocks], scheduled=[computed])


def test_garbage_past_a_pulled_prompt_does_not_show(llama: Path) -> None:
    """A pulled block is not ours past the prompt's end: whatever lies there is made zero before
    attention sees it.
    """
    runner = new_runner(llama)
    prompt = [9, 8, 7, 6, 5, 4]
    expected = greedy(llama, [prompt], 3)[0]
    runner.execute(plan_of(prompt, [7, 2, 5], sample=False))
    runner.kv_cache[2, ..., 6 % BLOCK_SIZE :, :] = float("nan")
    plan = plan_of([*prompt, expected[0]], [7, 2, 5], num_computed=6)
    plan.freed_rows = [0]
    (token,) = runner.execute(plan)
    assert token is not None
    assert token.token_id == expected[1]


def test_request_with_nan_draws_nothing(llama: Path) -> None:
    runner = new_runner(llama)
    runner._model.get_input_embeddings().weight.data[7] = float("nan")
    assert runner.execute(plan_of([3, 7, 4], [0])) == [None]


# The size of the cache


class SleepingPools(MemoryPools):
    sleeping_tags: frozenset[str] = frozenset()  # type: ignore[assignment]

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        self.sleeping_tags = frozenset(tags)
        return 1

    def wake_up(self, tags: Collection[str]) -> int:
        self.sleeping_tags -= frozenset(tags)
        return 1


def test_weights_that_change_while_they_are_loaded_are_not_used(tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path) / "model.safetensors"
    pinned = weight_digests(file.parent)

    def change(text: str, _: float | None) -> None:
        if text == "loading weights":
            save_file({name: one + 1 for name, one in load_file(file).items()}, file)

    with pytest.raises(ConfigError, match=r"changed while it was loaded: model.safetensors"):
        ModelRunner(make_spec(file.parent), tp=None, progress=change)
    with pytest.raises(ConfigError, match=r"since this launch began: model.safetensors"):
        ModelRunner(make_spec(file.parent), tp=None, progress=change, pinned=pinned)


def test_weights_that_changed_while_it_slept_are_not_used(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    runner = ModelRunner(
        make_spec(directory), tp=None, progress=ignore_progress, pools=SleepingPools()
    )
    file = directory / "model.safetensors"
    launched = file.read_bytes()
    runner.sleep(2)
    save_file({name: one + 1 for name, one in load_file(file).items()}, file, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(ConfigError, match="has changed while the engine was asleep"):
            runner.wake_up(TAGS)
        assert runner.sleeping_tags == {"weights"}
    file.write_bytes(launched)
    runner.wake_up(TAGS)
    assert not runner.sleeping_tags


def test_cache_too_small_for_one_block_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="is too small: a block has"):
        new_runner(llama, kv_cache_memory=100)


def test_ranks_have_as_many_blocks_as_the_one_with_the_least_memory(llama: Path) -> None:
    with_a_smaller_rank = Mock(tp_rank=0, tp_size=1, least=lambda number: number // 3)
    runner = new_runner(llama, with_a_smaller_rank)
    assert runner.num_blocks == len(runner.kv_cache) == new_runner(llama).num_blocks // 3


GIB = 1 << 30
TOTAL, CONTEXT, WEIGHTS, ACTIVATIONS = 140 * GIB, GIB // 2, 16 * GIB, 5 * GIB


def cache_of(used: int, utilization: float) -> int:
    return left_for_cache(
        free_bytes=TOTAL - used - CONTEXT - WEIGHTS,
        total_bytes=TOTAL,
        own_bytes=WEIGHTS,
        utilization=utilization,
        activation_bytes=ACTIVATIONS,
    )


@given(st.integers(0, TOTAL - CONTEXT - WEIGHTS), st.floats(0.01, 1))
def test_a_rank_stays_within_its_budget_and_the_device(used: int, utilization: float) -> None:
    cache = cache_of(used, utilization)
    assert cache >= 0
    if cache:
        assert WEIGHTS + ACTIVATIONS + cache <= utilization * TOTAL
        assert used + CONTEXT + WEIGHTS + ACTIVATIONS + cache <= TOTAL


# GPUs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_cuda_equals_generate(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    prompts = [[5 + length % 90] * length for length in LENGTHS]
    expected = greedy(directory, prompts, NUM_TOKENS)
    spec = make_spec(directory, device="cuda", device_indices=(0,), **changes)
    shown: list[str] = []
    runner = ModelRunner(spec, tp=None, progress=lambda text, _: shown.append(text))
    runner.warm_up()
    assert answers(runner, prompts, NUM_TOKENS, step_tokens=19, apart=1) == expected
    is_eager = "enforce_eager" in changes
    assert [text for text in shown if "graph" in text] == [
        f"capturing CUDA graphs: {size} rows" for size in ((16, 8, 4, 2, 1), ())[is_eager]
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_cuda_bfloat16_stays_close(name: str, tmp_path: Path) -> None:
    """Log-probability of a forced token after a prompt and again after a replayed decode step,
    against float32 on the CPU.
    """
    directory = save_tiny_model(name, tmp_path)
    sampling = SamplingParams(
        max_tokens=2, temperature=0.0, num_top_logprobs=0, logit_bias={17: 100.0}
    )
    found = []
    for changes in ({}, {"dtype": "bfloat16", "device": "cuda", "device_indices": (0,)}):
        runner = new_runner(directory, **changes)
        runner.warm_up()
        prompt = plan_of([5, 6, 7, 8, 9], [])
        prompt.new_rows[0].sampling = sampling
        prompt.new_blocks = [
            NewBlocks(row=0, group=group, first_block_index=0, block_ids=[2 * group, 2 * group + 1])
            for group in range(len(runner.layout.groups))
        ]
        decode = ScheduledRow(row=0, num_computed_tokens=5, num_tokens=1, sample=True)
        plans = [prompt, StepPlan(step_id=1, scheduled=[decode])]
        tokens = [token for plan in plans for token in runner.execute(plan) if token]
        assert [token.token_id for token in tokens] == [17, 17]
        found.append([token.logprob for token in tokens])
    assert found[0] == pytest.approx(found[1], abs=0.15)
