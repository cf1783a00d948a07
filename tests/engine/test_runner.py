"""Tokens of the runner equal those of transformers' generate, in float32 at temperature 0."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.step import NewBlocks, NewRow, RowTokens, ScheduledRow, StepPlan
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.hand_scheduler import (
    BLOCK_SIZE,
    GRAPHS,
    HandScheduler,
    ignore_progress,
    make_requests,
    make_spec,
)
from tests.engine.models.tiny import CONFIGS, greedy, save_tiny_model

NUM_TOKENS = 14
# Around the block (4), the chunks (7), and the windows (8, 10).
LENGTHS = [1, 3, 4, 5, 7, 8, 9, 10, 11, 16, 17, 33]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list, list]:
    """Directory, prompts, expected answers."""
    directory = save_tiny_model(request.param, tmp_path_factory.mktemp("models"))
    draw = random.Random(7)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in LENGTHS]
    return directory, prompts, greedy(directory, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def runner(model: tuple[Path, list, list]) -> ModelRunner:
    return ModelRunner(make_spec(model[0]), tp=None, progress=ignore_progress)


def test_alone_equals_generate(model: tuple[Path, list, list], runner: ModelRunner) -> None:
    _, prompts, expected = model
    for prompt, answer in zip(prompts, expected, strict=True):
        assert HandScheduler(runner).run(make_requests([prompt], NUM_TOKENS, chunk=64)) == [answer]


@pytest.mark.parametrize(("chunk", "apart"), [(64, 0), (7, 0), (7, 2), (4, 1), (1, 1)])
def test_batched_and_chunked_equals_generate(
    model: tuple[Path, list, list], runner: ModelRunner, chunk: int, apart: int
) -> None:
    _, prompts, expected = model
    requests = make_requests(prompts, NUM_TOKENS, chunk=chunk, apart=apart)
    assert HandScheduler(runner, seed=chunk).run(requests) == expected


def test_answers_vary(model: tuple[Path, list, list]) -> None:
    """The other tests could not fail with models that repeat one token."""
    assert len({token for answer in model[2] for token in answer}) > 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def test_row_is_taken_up_again_after_preemption(llama: Path) -> None:
    runner = ModelRunner(make_spec(llama), tp=None, progress=ignore_progress)
    prompt, expected = [9, 8, 7, 6, 5], greedy(llama, [[9, 8, 7, 6, 5]], 8)[0]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    new_row = NewRow(
        row=3,
        request_id="a",
        token_ids=prompt + expected[:5],
        num_prompt_tokens=5,
        sampling=sampling,
    )
    blocks = NewBlocks(row=3, group=0, first_block_index=0, block_ids=[7, 2, 5, 1])
    whole = ScheduledRow(row=3, num_computed_tokens=0, num_tokens=10, sample=True)
    output = runner.execute(
        StepPlan(step_id=0, new_rows=[new_row], new_blocks=[blocks], scheduled=[whole])
    )
    assert output[0].token_id == expected[5]


def test_tokens_sampled_elsewhere_are_taken_over(llama: Path) -> None:
    """As on a decode engine that pulled the prompt's blocks and got the first token from
    prefill.
    """
    runner = ModelRunner(make_spec(llama), tp=None, progress=ignore_progress)
    prompt = [9, 8, 7, 6, 5, 4]
    expected = greedy(llama, [prompt], 3)[0]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    new_row = NewRow(
        row=0, request_id="a", token_ids=prompt, num_prompt_tokens=6, sampling=sampling
    )
    blocks = NewBlocks(row=0, group=0, first_block_index=0, block_ids=[7, 2, 5])
    prefill = ScheduledRow(row=0, num_computed_tokens=0, num_tokens=6, sample=False)
    runner.execute(
        StepPlan(step_id=0, new_rows=[new_row], new_blocks=[blocks], scheduled=[prefill])
    )
    decode = ScheduledRow(row=0, num_computed_tokens=6, num_tokens=1, sample=True)
    first = RowTokens(row=0, position=6, token_ids=expected[:1])
    output = runner.execute(StepPlan(step_id=1, new_tokens=[first], scheduled=[decode]))
    assert output[0].token_id == expected[1]


def test_garbage_past_a_pulled_prompt_does_not_show(llama: Path) -> None:
    """A pulled block is not ours past the prompt's end: whatever lies there is made zero before
    attention sees it.
    """
    runner = ModelRunner(make_spec(llama), tp=None, progress=ignore_progress)
    prompt = [9, 8, 7, 6, 5, 4]
    expected = greedy(llama, [prompt], 3)[0]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    blocks = NewBlocks(row=0, group=0, first_block_index=0, block_ids=[7, 2, 5])
    new_row = NewRow(
        row=0, request_id="a", token_ids=prompt, num_prompt_tokens=6, sampling=sampling
    )
    prefill = ScheduledRow(row=0, num_computed_tokens=0, num_tokens=6, sample=False)
    runner.execute(
        StepPlan(step_id=0, new_rows=[new_row], new_blocks=[blocks], scheduled=[prefill])
    )
    runner.kv_cache[2, ..., 6 % BLOCK_SIZE :, :] = float("nan")
    again = NewRow(
        row=0,
        request_id="b",
        token_ids=[*prompt, expected[0]],
        num_prompt_tokens=6,
        sampling=sampling,
    )
    decode = ScheduledRow(row=0, num_computed_tokens=6, num_tokens=1, sample=True)
    plan = StepPlan(
        step_id=1, freed_rows=[0], new_rows=[again], new_blocks=[blocks], scheduled=[decode]
    )
    assert runner.execute(plan)[0].token_id == expected[1]


def test_warm_up_leaves_rows_and_cache_as_they_were(llama: Path) -> None:
    runner = ModelRunner(make_spec(llama), tp=None, progress=ignore_progress)
    runner.warm_up()
    assert not runner.kv_cache.any()
    prompt = [3, 4, 5]
    assert HandScheduler(runner).run(make_requests([prompt], 4, chunk=9)) == greedy(
        llama, [prompt], 4
    )


def test_cache_too_small_for_one_block_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="holds no block"):
        ModelRunner(make_spec(llama, kv_cache_memory=100), tp=None, progress=ignore_progress)


def test_ranks_have_as_many_blocks_as_the_one_with_the_least_memory(llama: Path) -> None:
    class GroupWithASmallerRank(TPGroup):
        def least(self, number: int) -> int:
            return number // 3

    alone = ModelRunner(make_spec(llama), tp=None, progress=ignore_progress)
    runner = ModelRunner(
        make_spec(llama), tp=GroupWithASmallerRank(0, 1, "cpu", None), progress=ignore_progress
    )
    assert runner.num_blocks == len(runner.kv_cache) == alone.num_blocks // 3


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
    assert (
        HandScheduler(runner).run(make_requests(prompts, NUM_TOKENS, chunk=7, apart=1)) == expected
    )
    expected_graphs = [f"{size} rows" for size in (16, 8, 4, 2, 1)]
    if "enforce_eager" in changes or name == "gpt-oss":
        expected_graphs = []
    assert [text for text in shown if "graph" in text] == [
        f"capturing CUDA graphs: {text}" for text in expected_graphs
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_cuda_bfloat16_stays_close(name: str, tmp_path: Path) -> None:
    """Log-probability of a forced token after a prompt and again after a replayed decode step,
    against float32 on the CPU.
    """
    directory = save_tiny_model(name, tmp_path)
    found = []
    for changes in ({}, {"dtype": "bfloat16", "device": "cuda", "device_indices": (0,)}):
        runner = ModelRunner(make_spec(directory, **changes), tp=None, progress=ignore_progress)
        runner.warm_up()
        sampling = SamplingParams(
            max_tokens=2, temperature=0.0, num_top_logprobs=0, logit_bias={17: 100.0}
        )
        new_row = NewRow(
            row=0, request_id="a", token_ids=[5, 6, 7, 8, 9], num_prompt_tokens=5, sampling=sampling
        )
        groups = range(len(runner.layout.groups))
        blocks = [
            NewBlocks(row=0, group=group, first_block_index=0, block_ids=[2 * group, 2 * group + 1])
            for group in groups
        ]
        steps = [ScheduledRow(row=0, num_computed_tokens=0, num_tokens=5, sample=True)]
        steps += [ScheduledRow(row=0, num_computed_tokens=5, num_tokens=1, sample=True)]
        plans = [StepPlan(step_id=0, new_rows=[new_row], new_blocks=blocks, scheduled=steps[:1])]
        plans += [StepPlan(step_id=1, scheduled=steps[1:])]
        tokens = [runner.execute(plan)[0] for plan in plans]
        assert [token.token_id for token in tokens] == [17, 17]
        found.append([token.logprob for token in tokens])
    assert found[0] == pytest.approx(found[1], abs=0.15)


def test_request_with_nan_draws_nothing_and_harms_no_other_in_its_step(
    llama: Path, tmp_path: Path
) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    runner = ModelRunner(make_spec(tmp_path), tp=None, progress=ignore_progress)
    prompts, sampling = [[3, 7, 4], [3, 5, 4]], SamplingParams(max_tokens=8, temperature=0.0)
    plan = StepPlan(
        step_id=0,
        new_rows=[
            NewRow(
                row=i,
                request_id=str(i),
                token_ids=prompts[i],
                num_prompt_tokens=3,
                sampling=sampling,
            )
            for i in (0, 1)
        ],
        new_blocks=[NewBlocks(row=i, group=0, first_block_index=0, block_ids=[i]) for i in (0, 1)],
        scheduled=[
            ScheduledRow(row=i, num_computed_tokens=0, num_tokens=3, sample=True) for i in (0, 1)
        ],
    )
    sick, well = runner.execute(plan)
    assert sick is None
    assert well is not None
    assert [well.token_id] == greedy(llama, prompts[1:], 1)[0]
