"""Disaggregated answers equal those of transformers' own generate, token by token."""

import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pdlaunch.engine.models.convert import ensure_converted
from tests.e2e.api import complete, complete_all, count_now, engine_apis, greedy_body, total_now
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import clean_environ, launched
from tests.e2e.tiny_models import greedy, make_prompts, make_tiny_model, make_tokenizer
from tests.e2e.waiting import await_true
from tests.engine.models.tiny import greedy as greedy_by_ours
from tests.engine.models.tiny import save_tiny_model

DEMO_LENGTHS = (1, 17, 513)
"""Lengths beyond boundaries of chunks (512) and blocks (16). Tests of tiny models, which take a
tenth of the time, cover each boundary.
"""
NUM_TOKENS = 8
TINY_LENGTHS = (1, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 130, 200, 257)
"""Lengths at each boundary of blocks of 16, chunks of 32 and windows of 24, and one beside it."""
PROMPTS = make_prompts(11, TINY_LENGTHS)
CHUNKS = {"PDLAUNCH_MAX_NUM_BATCHED_TOKENS": "32"}


def test_demo_model_in_a_batch_then_from_prefix_cache_then_cold(demo: Deployment) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(100, 40_000) for _ in range(length)] for length in DEMO_LENGTHS]
    directory = ensure_converted("smollm2", lambda stage, share: None)
    # In another process, because the weights take 540 MiB.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        expected = pool.submit(greedy, directory, prompts, NUM_TOKENS)
        for kind in ("cold", "prefix hit"):
            answers = complete_all(demo.url, prompts, NUM_TOKENS, concurrency=8)
            assert answers == expected.result(), kind
    # A salt prevents prefix cache hits.
    alone = [complete(demo.url, prompt, NUM_TOKENS, cache_salt="cold") for prompt in prompts]
    assert alone == expected.result()


def test_different_numbers_of_ranks(llama: Path) -> None:
    """Through the router, one rank pulls from three. For the other direction, the test sends the
    prompt to the decode engine first.
    """
    expected = greedy(llama, PROMPTS, NUM_TOKENS)
    with launched(llama, "--prefill-tp", "3", environ=clean_environ() | CHUNKS) as deployment:
        assert complete_all(deployment.url, PROMPTS, NUM_TOKENS, concurrency=4) == expected
        apis = {role: engine_apis(deployment.url, role)[0] for role in ("prefill", "decode")}
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(
                lambda prompt: complete_in_turn(apis["decode"], apis["prefill"], prompt), PROMPTS
            )
            assert list(answers) == expected
        for api in apis.values():
            assert count_now(api, "kv_transfers") >= len(PROMPTS)
            assert count_now(api, "kv_transfer_failures") == 0


def complete_in_turn(first: Api, then: Api, prompt: list[int]) -> list[int]:
    """As a router does, let the first engine compute the prompt, and the second one pull it and
    continue. A salt prevents prefix cache hits.
    """
    salted = greedy_body(prompt, 1) | {"cache_salt": "in turn"}
    params = {"kv_transfer_params": {"do_remote_decode": True}}
    status, answer = first.post("/v1/completions", salted | params)
    assert status == 200, answer
    handed = {"kv_transfer_params": answer["kv_transfer_params"]}
    return complete(then, prompt, NUM_TOKENS, cache_salt="in turn", **handed)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "smollm3"])
def test_tiny_models_of_every_family(family: str, tmp_path: Path) -> None:
    """Families without another test: many tests have llama, that of the hub has qwen3, that of the
    host tier has gemma3.
    """
    directory = make_tiny_model(family, tmp_path)
    expected = greedy(directory, PROMPTS, 24)
    with launched(directory, environ=clean_environ() | CHUNKS) as deployment:
        assert complete_all(deployment.url, PROMPTS, 24, concurrency=8) == expected


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_on_several_gpus(prefill_tp: int, decode_tp: int, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)  # with a KV head for each of two ranks
    make_tokenizer().save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    prompts = [[5 + length % 90] * length for length in (33, 70, 100)]
    expected = greedy_by_ours(model, prompts, 24)
    sizes = ["--prefill-tp", str(prefill_tp), "--decode-tp", str(decode_tp)]
    with launched(model, "--device", "cuda", "--kv-cache-memory", "1GiB", *sizes) as deployment:
        url = deployment.url
        for number, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True), start=1):
            assert complete(url, prompt, 24) == tokens
            await_true(
                lambda number=number: total_now(url, "kv_transfers") >= number,
                "the KV blocks are pulled",
            )
        assert total_now(url, "kv_verification_failures") == 0
