"""The disaggregated answer equals transformers' own generate, token for token."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from pdlaunch.engine.models.convert import ensure_converted
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from tests.e2e.api import complete, complete_all, count_now, engine_apis
from tests.e2e.conftest import clean_environ
from tests.e2e.tiny_models import FAMILIES, VOCAB_SIZE, greedy, make_tiny_model

DEMO_LENGTHS = (1, 16, 17, 100, 512, 513)
"""At boundaries of chunks (512) and blocks (16), and an ordinary length. The tiny models, which
take a tenth of the time, have one at each boundary of blocks.
"""
NUM_TOKENS = 8
TINY_LENGTHS = (1, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 130, 200, 257)
"""At each boundary of blocks of 16, chunks of 32 and windows of 24, and one off it."""
FEW_LENGTHS = (1, 17, 64, 130)
TINY_ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory", "64MiB")
CHUNKS = {"PDLAUNCH_MAX_NUM_BATCHED_TOKENS": "32"}


@pytest.fixture(scope="module")
def demo_prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(100, 40_000) for _ in range(length)] for length in DEMO_LENGTHS]


@pytest.fixture(scope="module")
def demo_answers(demo_prompts: list[list[int]]) -> list[list[int]]:
    directory = ensure_converted("smollm2", lambda stage, share: None)
    # Its weights would take 540 MiB of this process.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(greedy, directory, demo_prompts, NUM_TOKENS).result()


def test_demo_model_cold_then_from_prefix_cache_then_in_a_batch(
    demo: Deployment, demo_prompts: list[list[int]], demo_answers: list[list[int]]
) -> None:
    for kind in ("cold", "prefix hit"):
        answers = [complete(demo.url, prompt, NUM_TOKENS) for prompt in demo_prompts]
        assert answers == demo_answers, kind
    assert complete_all(demo.url, demo_prompts, NUM_TOKENS, concurrency=8) == demo_answers


def test_demo_model_cold_in_a_batch(
    demo: Deployment, demo_prompts: list[list[int]], demo_answers: list[list[int]]
) -> None:
    """A salt keeps the prefix cache out."""
    assert (
        complete_all(demo.url, demo_prompts, NUM_TOKENS, concurrency=8, cache_salt="cold")
        == demo_answers
    )


def test_as_many_ranks_on_either_side(tmp_path: Path) -> None:
    """Each rank pulls from the one of its number. Six ranks on few cores take turns at every sum: a
    few of the lengths.
    """
    directory, prompts = make_tiny_model("llama", tmp_path), make_prompts(FEW_LENGTHS)
    arguments = ("--model", str(directory), *TINY_ARGUMENTS, "--prefill-tp", "3")
    with running_deployment(
        (*arguments, "--decode-tp", "3"), environ=clean_environ() | CHUNKS
    ) as deployment:
        answers = complete_all(deployment.url, prompts, NUM_TOKENS, concurrency=4)
    assert answers == greedy(directory, prompts, NUM_TOKENS)


def test_different_numbers_of_ranks(tmp_path: Path) -> None:
    """The router has one rank pull from three; the other way round each engine is asked for the
    other one's part.
    """
    directory, prompts = make_tiny_model("llama", tmp_path), make_prompts(TINY_LENGTHS)
    expected = greedy(directory, prompts, NUM_TOKENS)
    arguments = ("--model", str(directory), *TINY_ARGUMENTS, "--prefill-tp", "3")
    with running_deployment(arguments, environ=clean_environ() | CHUNKS) as deployment:
        assert complete_all(deployment.url, prompts, NUM_TOKENS, concurrency=4) == expected
        apis = {role: engine_apis(deployment.url, role)[0] for role in ("prefill", "decode")}
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(
                lambda prompt: complete_in_turn(apis["decode"], apis["prefill"], prompt), prompts
            )
            assert list(answers) == expected
        for api in apis.values():
            assert count_now(api, "transfers") >= len(prompts)
            assert count_now(api, "transfer_failures") == 0


def complete_in_turn(first: Api, then: Api, prompt: list[int]) -> list[int]:
    """What a router does: the first engine computes the prompt, the second one pulls and goes on. A
    salt keeps caches out.
    """
    body = {
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": "in turn",
    }
    status, answer = first.post(
        "/v1/completions", body | {"kv_transfer_params": {"do_remote_decode": True}}
    )
    assert status == 200, answer
    return complete(
        then,
        prompt,
        NUM_TOKENS,
        cache_salt="in turn",
        kv_transfer_params=answer["kv_transfer_params"],
    )


def make_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "qwen3"}))
def test_tiny_models_of_every_family(family: str, tmp_path: Path) -> None:
    """Those that have no launch of their own anywhere else: llama has many, qwen3 that of the
    hub.
    """
    directory, prompts = make_tiny_model(family, tmp_path), make_prompts(TINY_LENGTHS)
    expected = greedy(directory, prompts, 24)
    with running_deployment(
        ("--model", str(directory), *TINY_ARGUMENTS), environ=clean_environ() | CHUNKS
    ) as deployment:
        assert [complete(deployment.url, prompt, 24) for prompt in prompts] == expected
        assert complete_all(deployment.url, prompts, 24, concurrency=8) == expected
