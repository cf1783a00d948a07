"""Two prefill and two decode engines, a router that knows only vLLM's protocol, and the death of
all ranks at once.
"""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from tests.e2e.api import (
    await_ready,
    complete,
    complete_all,
    count_now,
    engine_apis,
    idle,
    streamed,
    total_now,
)
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import num_migrations
from tests.e2e.tiny_models import VOCAB_SIZE, greedy
from tests.e2e.waiting import await_true

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_by_two.yaml"
NUM_TOKENS = 20
NUM_KILLS = 2


@pytest.fixture(scope="module")
def two_by_two(llama: Path) -> Iterator[Deployment]:
    arguments = (str(EXAMPLE), "--model", str(llama), "--kv-cache-memory", "32MiB")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(20, 90))] for _ in range(12)]


@pytest.fixture(scope="module")
def expected(llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy(llama, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def engines(two_by_two: Deployment) -> list[Api]:
    """APIs of a prefill and a decode engine."""
    return [engine_apis(two_by_two.url, role)[0] for role in ("prefill", "decode")]


def test_every_engine_takes_its_part(
    two_by_two: Deployment, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert complete_all(two_by_two.url, prompts, NUM_TOKENS, concurrency=6) == expected
    for api in engine_apis(two_by_two.url):
        await_true(
            lambda api=api: api.metrics()["pdlaunch_sampled_tokens_total"] > 0, "it has worked"
        )
    await_true(lambda: idle(two_by_two.url), "every block is free")


@pytest.mark.parametrize("keeps_our_key", [True, False])
def test_a_router_of_vllm_gets_the_same_tokens(
    engines: list[Api], prompts: list[list[int]], expected: list[list[int]], keeps_our_key: bool
) -> None:
    prefill, decode = engines
    before = count_now(decode, "kv_transfers")
    for prompt, tokens in zip(prompts, expected, strict=True):
        salt = {"cache_salt": f"vllm {keeps_our_key}"}
        params = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
        }
        one_token = {"prompt": prompt, "temperature": 0, "max_tokens": 1, "stream": False}
        handed = ask(prefill, one_token | salt | {"kv_transfer_params": params})
        handed_over = handed["kv_transfer_params"]
        if not keeps_our_key:
            del handed_over["pdlaunch"]
        fields = salt | {"kv_transfer_params": handed_over}
        assert complete(decode, prompt, NUM_TOKENS, **fields) == tokens
    assert count_now(decode, "kv_transfers") == before + len(prompts)


def test_a_router_of_vllm_that_asks_both_for_one_token_leaves_no_lease(
    two_by_two: Deployment, engines: list[Api]
) -> None:
    prefill, decode = engines
    body = {"prompt": list(range(50, 90)), "temperature": 0, "max_tokens": 1, "ignore_eos": True}
    body |= {"cache_salt": "one token"}
    expired = count_now(prefill, "kv_leases_expired")
    first = ask(prefill, body | {"kv_transfer_params": {"do_remote_decode": True}})
    ask(decode, body | {"kv_transfer_params": first["kv_transfer_params"]})
    await_true(lambda: idle(two_by_two.url), "every block is free")
    assert count_now(prefill, "kv_leases_expired") == expired


def ask(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = api.post("/v1/completions", body)
    assert status == 200, answer
    return answer


def test_a_seeded_sample_is_the_same_wherever_it_runs(
    two_by_two: Deployment, prompts: list[list[int]]
) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 77}
    through_pairs = complete_all(two_by_two.url, prompts, NUM_TOKENS, concurrency=6, **fields)
    for api in engine_apis(two_by_two.url):
        alone = [complete(api, prompt, NUM_TOKENS, **fields) for prompt in prompts[:4]]
        assert alone == through_pairs[:4]
    assert len({tuple(tokens) for tokens in through_pairs}) == len(prompts)


def test_a_grammar_is_followed_from_engine_to_engine(
    two_by_two: Deployment, prompts: list[list[int]], engines: list[Api]
) -> None:
    """A pair follows it like one engine, also after the deaths of the engines with the stream."""
    prompt, fields = prompts[0], {"guided_regex": "([a-f]{3,9}-[0-9]{2,4},){60}"}
    alone = complete(engines[1], prompt, 1000, cache_salt="grammar", **fields)
    assert complete(two_by_two.url, prompt, 1000, **fields) == alone
    before = num_migrations(two_by_two)
    with streamed(two_by_two.url, prompt, 1000, **fields) as token_ids:
        found = list(islice(token_ids, 20))
        for name, process in two_by_two.processes().items():
            if name.startswith("decode-") and "/rank-" in name:
                process.kill()
        assert found + list(token_ids) == alone
    assert num_migrations(two_by_two) > before
    await_ready(two_by_two.url, 4)


def test_prefill_tells_the_log_probabilities_of_the_prompt(
    two_by_two: Deployment, prompts: list[list[int]], engines: list[Api]
) -> None:
    before = count_now(engines[1], "kv_transfers")
    for num_tokens in (0, 1, 9):
        body = {"prompt": prompts[1], "max_tokens": num_tokens, "temperature": 0}
        body |= {"echo": True, "logprobs": 2, "ignore_eos": True}
        choices = [ask(api, body)["choices"][0] for api in (Api(two_by_two.url), engines[1])]
        told, alone = (choice["logprobs"] for choice in choices)
        assert choices[0]["text"] == choices[1]["text"]
        assert told["tokens"] == alone["tokens"]
        assert len(told["tokens"]) == len(prompts[1]) + num_tokens
        assert told["text_offset"] == alone["text_offset"]
        assert told["token_logprobs"][1:] == pytest.approx(alone["token_logprobs"][1:], abs=1e-3)
    assert before < total_now(two_by_two.url, "kv_transfers")


def test_no_request_is_lost_when_all_ranks_die_at_once(
    two_by_two: Deployment, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with clients(two_by_two.url, prompts[0], expected[0]) as num_answers:
        for _ in range(NUM_KILLS):
            dead = {name: each for name, each in two_by_two.processes().items() if "/rank-" in name}
            assert len(dead) == 4
            for process in dead.values():
                process.kill()
            await_true(lambda dead=dead: are_new(two_by_two, dead), "ranks are back")
            await_ready(two_by_two.url, 4)
            # A request waits for at most 60 s in all, even if engines die several times.
            before = num_answers.copy()
            await_true(
                lambda n=before: all(map(operator.gt, num_answers, n)), "each client has an answer"
            )


def are_new(launch: Deployment, dead: dict[str, psutil.Process]) -> bool:
    found = launch.processes()
    return all(name in found and found[name].pid != dead[name].pid for name in dead)


@contextmanager
def clients(url: str, prompt: list[int], expected: list[int]) -> Iterator[list[int]]:
    """Six clients send requests until the block ends; yields each client's number of answers."""
    ends, num_answers = threading.Event(), [0] * 6

    def ask(client: int) -> None:
        while not ends.is_set():
            salt = f"{client}-{num_answers[client]}"
            assert complete(url, prompt, NUM_TOKENS, cache_salt=salt) == expected
            num_answers[client] += 1

    with ThreadPoolExecutor(6) as pool:
        works = [pool.submit(ask, client) for client in range(6)]
        try:
            yield num_answers
        finally:
            ends.set()
            for work in works:
                work.result()
