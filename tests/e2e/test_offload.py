"""The host tier with a device cache that is far too small: tokens are right when blocks move, go
bad, or processes die.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.e2e.api import await_ready, complete_all, count_now, engine_apis, idle, total_now
from tests.e2e.client import Api, Deployment
from tests.e2e.faults import faulty_deployment
from tests.e2e.tiny_models import greedy, make_prompts, make_tiny_model
from tests.e2e.waiting import await_true

LENGTHS = (60, 90, 120, 150, 180, 200, 100, 81)
NUM_TOKENS = 24
NUM_TOGETHER, LONG_NUM_TOKENS = 4, 120
SMALL_CACHE = "500KiB"
"""It holds 27 blocks of the llama, and 41 of the hybrid model with its three groups. The prompts
alone fill 58 blocks of a group.
"""
HEALTHY = {"seed": 1, "rate": 0, "lease_rate": 0, "chunk_rate": 0}


def tiered_deployment(
    model: Path, *arguments: str, decode_cache: str = SMALL_CACHE, **faults: Any
) -> AbstractContextManager[Deployment]:
    command = ("--kv-cache-memory", SMALL_CACHE, "--kv-offload-memory", "32MiB", *arguments)
    environ = {"PDLAUNCH_DECODE__KV_CACHE_MEMORY": decode_cache}
    return faulty_deployment(model, HEALTHY | faults, *command, environ=environ)


def engine_of(deployment: Deployment, role: str) -> Api:
    (api,) = engine_apis(deployment.url, role)
    return api


def complete_together(api: Api, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Send all prompts in one call, so that the engine has them in the same step. As with
    ``greedy``, no token ends an answer early.
    """
    lengths = {"max_tokens": num_tokens, "min_tokens": num_tokens}
    body = {"prompt": prompts, "temperature": 0, "return_token_ids": True, **lengths}
    status, answer = api.post("/v1/completions", body)
    assert status == 200, answer
    choices: list[dict[str, Any]] = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]


class Answers:
    """The answers of transformers' own generate."""

    def __init__(self, model: Path) -> None:
        self.prompts = make_prompts(5, LENGTHS)
        self.short = greedy(model, self.prompts, NUM_TOKENS)
        self.together = greedy(model, self.prompts[:NUM_TOGETHER], LONG_NUM_TOKENS)

    def check(self, url: str, cache_salt: str = "") -> None:
        fields = {"min_tokens": NUM_TOKENS, "ignore_eos": False, "cache_salt": cache_salt}
        answers = complete_all(url, self.prompts, NUM_TOKENS, concurrency=4, **fields)
        assert answers == self.short

    def check_together(self, api: Api) -> None:
        """Send more than the cache can hold, so that the engine has to preempt."""
        before = count_now(api, "num_preemptions")
        assert complete_together(api, self.prompts[:NUM_TOGETHER], LONG_NUM_TOKENS) == self.together
        assert count_now(api, "num_preemptions") > before


def test_tokens_of_a_hybrid_model_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_tiny_model("gemma3_text", tmp_path)
    answers = Answers(model)
    with tiered_deployment(model) as deployment:
        for _ in range(2):
            answers.check(deployment.url)
        assert (
            count_now(engine_of(deployment, "prefill"), "prompt_tokens_cached_by_source/host") > 0
        )
        answers.check_together(engine_of(deployment, "decode"))
        assert count_now(engine_of(deployment, "decode"), "kv_offload_loaded_bytes") > 0
        assert total_now(deployment.url, "kv_offload_load_failures") == 0
        check_integrity(deployment)


def test_bad_blocks_and_a_kill_in_the_middle_of_copies_change_no_token(tmp_path: Path) -> None:
    """With three ranks, each rank finds its own bad blocks."""
    model = make_tiny_model("llama", tmp_path)
    answers = Answers(model)
    copies_wait = tmp_path / "copies-wait"
    faults = {"chunk_rate": 0.1, "copies_wait_file": str(copies_wait)}
    with tiered_deployment(
        model, "--decode-tp", "3", decode_cache="170KiB", **faults
    ) as deployment:
        decode = engine_of(deployment, "decode")
        for _ in range(2):
            answers.check(deployment.url)
            # Sent to decode without a pull, so that it needs its host tier.
            assert complete_together(decode, answers.prompts, NUM_TOKENS) == answers.short
        for role in ("prefill", "decode"):
            assert count_now(engine_of(deployment, role), "kv_offload_bad_blocks") > 0, role
        answers.check_together(engine_of(deployment, "prefill"))
        kill_in_the_middle_of_copies(deployment, answers, copies_wait)
        check_integrity(deployment)


def kill_in_the_middle_of_copies(
    deployment: Deployment, answers: Answers, copies_wait: Path
) -> None:
    """All running requests are still answered. Their prompts are new, so that each block is copied.

    Copies are held, so that none ends before the kill.
    """
    engine = engine_of(deployment, "decode")
    copies_wait.touch()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(answers.check, deployment.url, "kill")
        try:
            await_true(
                lambda: count_now(engine, "num_offload_jobs") > 0 or running.done(),
                "a copy is in flight",
            )
            assert not running.done(), "all was answered without a copy"
            deployment.processes()["decode-0/rank-1"].kill()
        finally:
            copies_wait.unlink()
        running.result()


def check_integrity(deployment: Deployment) -> None:
    """Check that all blocks are free, and that ``/pdlaunch/integrity`` finds no fault."""
    await_ready(deployment.url)
    await_true(lambda: idle(deployment.url), "no request and no lease is left")
    for api in engine_apis(deployment.url):
        await_true(lambda api=api: count_now(api, "num_offload_jobs") == 0, "no copy is in flight")
        assert api.get("/pdlaunch/integrity")[0] == 200
        assert count_now(api, "num_free_blocks") == count_now(api, "num_blocks")
        assert count_now(api, "num_used_host_blocks") <= count_now(api, "num_host_blocks")
