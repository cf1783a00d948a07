"""Two prefill and two decode engines, a router that knows only vLLM's protocol, and the death of
all ranks at once.
"""

import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import kill_and_wait
from tests.e2e.api import (
    await_answers,
    await_ready,
    clients,
    complete,
    complete_all,
    count_now,
    engine_apis,
    idle,
    streamed,
    total_now,
)
from tests.e2e.client import Api, Deployment, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import num_migrations
from tests.e2e.tiny_models import greedy, make_prompts
from tests.e2e.waiting import await_true

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_by_two.yaml"
PROMPTS = make_prompts(3, range(20, 92, 6))
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def two_by_two(llama: Path) -> Iterator[Deployment]:
    arguments = (str(EXAMPLE), "--model", str(llama), "--kv-cache-memory", "32MiB")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return greedy(llama, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def engines(two_by_two: Deployment) -> list[Api]:
    """APIs of a prefill and a decode engine."""
    return [engine_apis(two_by_two.url, role)[0] for role in ("prefill", "decode")]


def test_every_engine_takes_its_part(two_by_two: Deployment, expected: list[list[int]]) -> None:
    assert complete_all(two_by_two.url, PROMPTS, NUM_TOKENS, concurrency=6) == expected
    for api in engine_apis(two_by_two.url):
        await_true(
            lambda api=api: api.metrics()["pdlaunch_sampled_tokens_total"] > 0, "it has worked"
        )
    await_true(lambda: idle(two_by_two.url), "every block is free")


@pytest.mark.parametrize("keeps_our_key", [True, False])
def test_a_router_of_vllm_gets_the_same_tokens(
    engines: list[Api], expected: list[list[int]], keeps_our_key: bool
) -> None:
    prefill, decode = engines
    before = count_now(decode, "kv_transfers")
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
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
    assert count_now(decode, "kv_transfers") == before + len(PROMPTS)


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


def test_a_seeded_sample_is_the_same_wherever_it_runs(two_by_two: Deployment) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 77}
    through_pairs = complete_all(two_by_two.url, PROMPTS, NUM_TOKENS, concurrency=6, **fields)
    for api in engine_apis(two_by_two.url):
        alone = [complete(api, prompt, NUM_TOKENS, **fields) for prompt in PROMPTS[:4]]
        assert alone == through_pairs[:4]
    assert len({tuple(tokens) for tokens in through_pairs}) == len(PROMPTS)


def test_a_grammar_is_followed_from_engine_to_engine(
    two_by_two: Deployment, engines: list[Api]
) -> None:
    """A pair follows it like one engine, also after the deaths of the engines with the stream."""
    prompt, fields = PROMPTS[0], {"guided_regex": "([a-f]{3,9}-[0-9]{2,4},){60}"}
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
    two_by_two: Deployment, engines: list[Api]
) -> None:
    before = count_now(engines[1], "kv_transfers")
    for num_tokens in (0, 1, 9):
        body = {"prompt": PROMPTS[1], "max_tokens": num_tokens, "temperature": 0}
        body |= {"echo": True, "logprobs": 2, "ignore_eos": True}
        choices = [ask(api, body)["choices"][0] for api in (Api(two_by_two.url), engines[1])]
        told, alone = (choice["logprobs"] for choice in choices)
        assert choices[0]["text"] == choices[1]["text"]
        assert told["tokens"] == alone["tokens"]
        assert len(told["tokens"]) == len(PROMPTS[1]) + num_tokens
        assert told["text_offset"] == alone["text_offset"]
        assert told["token_logprobs"][1:] == pytest.approx(alone["token_logprobs"][1:], abs=1e-3)
    assert before < total_now(two_by_two.url, "kv_transfers")


def test_no_request_is_lost_when_all_ranks_die_at_once(
    two_by_two: Deployment, expected: list[list[int]]
) -> None:
    def ask_anew(client: int, number: int) -> None:
        salt = f"{client}-{number}"
        found = complete(two_by_two.url, PROMPTS[0], NUM_TOKENS, cache_salt=salt)
        assert found == expected[0]

    with clients(6, ask_anew) as num_answers:
        ranks = [name for name in two_by_two.processes() if "/rank-" in name]
        assert len(ranks) == 4
        kill_and_wait(two_by_two, "+".join(ranks), signal.SIGKILL)
        # A request waits for at most 60 s in all, even if engines die several times.
        await_answers(num_answers)
