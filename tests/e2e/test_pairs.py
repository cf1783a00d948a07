"""Several engines of each role, a router that knows only vLLM's protocol, and a cache that is too
small.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from pdlaunch.launch.client.smoke import engines_of
from tests.e2e.api import complete, complete_all, count_now, idle, requests_in_flight, total_now
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import paused
from tests.e2e.tiny_models import VOCAB_SIZE, greedy, make_tiny_model
from tests.e2e.waiting import await_true

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_by_two.yaml"
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two_by_two(tiny_model: Path) -> Iterator[Deployment]:
    arguments = (str(EXAMPLE), "--model", str(tiny_model), "--kv-cache-memory", "32MiB")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(20, 90))] for _ in range(12)]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy(tiny_model, prompts, NUM_TOKENS)


def engines(deployment: Deployment) -> dict[str, Api]:
    admin = admin_api(deployment.url)
    return {engine["name"]: admin.engine(engine["name"]) for engine in engines_of(admin)}


def test_every_engine_takes_its_part(
    two_by_two: Deployment, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert complete_all(two_by_two.url, prompts, NUM_TOKENS, concurrency=6) == expected
    for name, api in engines(two_by_two).items():
        await_true(
            lambda api=api: api.metrics()["pdlaunch_sampled_tokens_total"] > 0, f"{name} has worked"
        )
    await_true(lambda: idle(two_by_two.url), "every block is free")


@pytest.mark.parametrize("keeps_our_key", [True, False])
def test_a_router_of_vllm_gets_the_same_tokens(
    two_by_two: Deployment, prompts: list[list[int]], expected: list[list[int]], keeps_our_key: bool
) -> None:
    apis = engines(two_by_two)
    before = count_now(apis["decode-0"], "transfers")
    for prompt, tokens in zip(prompts, expected, strict=True):
        salted = {"prompt": prompt, "temperature": 0, "cache_salt": f"vllm {keeps_our_key}"}
        params = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
        }
        first = ask(
            apis["prefill-0"],
            salted | {"max_tokens": 1, "stream": False, "kv_transfer_params": params},
        )
        handed_over = first["kv_transfer_params"]
        if not keeps_our_key:
            del handed_over["pdlaunch"]
        fields = {
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": handed_over,
        }
        answer = ask(apis["decode-0"], salted | fields)
        assert answer["choices"][0]["token_ids"] == tokens
    assert count_now(apis["decode-0"], "transfers") == before + len(prompts)


def test_a_router_of_vllm_that_asks_both_for_one_token_leaves_no_lease(
    two_by_two: Deployment,
) -> None:
    apis = engines(two_by_two)
    salted = {
        "prompt": list(range(50, 90)),
        "temperature": 0,
        "cache_salt": "one token",
        "max_tokens": 1,
        "ignore_eos": True,
    }
    expired = count_now(apis["prefill-0"], "leases_expired")
    first = ask(apis["prefill-0"], salted | {"kv_transfer_params": {"do_remote_decode": True}})
    ask(apis["decode-0"], salted | {"kv_transfer_params": first["kv_transfer_params"]})
    await_true(lambda: idle(two_by_two.url), "every block is free")
    assert count_now(apis["prefill-0"], "leases_expired") == expired


def ask(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = api.post("/v1/completions", body)
    assert status == 200, answer
    return answer


def test_a_seeded_sample_is_the_same_wherever_it_runs(
    two_by_two: Deployment, prompts: list[list[int]]
) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 77}
    through_pairs = complete_all(two_by_two.url, prompts, NUM_TOKENS, concurrency=6, **fields)
    for api in engines(two_by_two).values():
        assert [
            complete(api, prompt, NUM_TOKENS, **fields) for prompt in prompts[:4]
        ] == through_pairs[:4]
    assert len({tuple(tokens) for tokens in through_pairs}) == len(prompts)


def test_preempted_requests_answer_as_if_they_were_alone(
    tiny_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Eight requests of up to 270 tokens in a decode cache of 600."""
    config = tmp_path / "pdlaunch.yaml"
    config.write_text(
        f"model: {tiny_model}\nkv_cache_memory: 16MiB\ndecode: {{kv_cache_memory: 720KiB}}\n"
    )
    expected = greedy(tiny_model, prompts[:8], 180)
    with running_deployment([str(config)], environ=clean_environ()) as deployment:
        with ThreadPoolExecutor(1) as pool:
            with paused(deployment.processes()["decode-0/rank-0"]):
                answers = pool.submit(complete_all, deployment.url, prompts[:8], 180, concurrency=8)
                await_true(
                    lambda: requests_in_flight(deployment.url) == 8, "all requests are there"
                )
            assert answers.result() == expected
        assert total_now(deployment.url, "preemptions") > 0
        await_true(lambda: idle(deployment.url), "every block is free")
