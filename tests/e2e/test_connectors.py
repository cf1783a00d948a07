"""Whole deployments over the connectors that are not the default; the default is what all other
tests use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pdlaunch.launch.client.deployment import Deployment, running_deployment
from tests.e2e.api import complete, complete_all, idle, total_now
from tests.e2e.conftest import clean_environ
from tests.e2e.listening import await_unlocked_ports
from tests.e2e.tiny_models import VOCAB_SIZE, greedy, make_tiny_model
from tests.e2e.waiting import await_true
from tests.mooncake import mooncake_problem

LENGTHS = (1, 15, 16, 17, 40, 64, 100, 200)
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy(tiny_model, prompts, NUM_TOKENS)


@pytest.fixture(
    scope="module",
    params=[("mooncake", "--prefill-tp"), ("file", "--decode-tp")],
    ids=["mooncake", "file"],
)
def deployment(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """TP 3 with TP 1."""
    connector, tp_flag = request.param
    arguments = [
        "--model",
        str(tiny_model),
        "--kv-cache-memory",
        "16MiB",
        "--kv-connector",
        connector,
        tp_flag,
        "3",
    ]
    if connector == "file":
        arguments += ["--kv-file-directory", str(tmp_path_factory.mktemp("kv"))]
    if connector == "mooncake" and (problem := mooncake_problem()):
        pytest.skip(f"mooncake: {problem}")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment


def test_answers_are_those_of_the_model_and_their_blocks_were_pulled(
    deployment: Deployment, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert complete_all(deployment.url, prompts, NUM_TOKENS, concurrency=4) == expected
    assert total_now(deployment.url, "transfers") >= len(prompts)
    assert total_now(deployment.url, "transfer_failures") == 0
    await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def test_what_listens_without_asking_who_comes(deployment: Deployment) -> None:
    """Gloo within the TP group (PD425), and Mooncake's two ports a rank (PD409)."""
    ranks = {name for name in deployment.processes() if "/rank-" in name}
    role = "prefill" if "decode-0/rank-1" not in ranks else "decode"
    of_mooncake = 2 if role == "prefill" else 0
    expected = {
        name: count for name in ranks if (count := of_mooncake + name.startswith(f"{role}-0/"))
    }
    await_unlocked_ports(deployment, expected)


def test_a_killed_prefill_rank_comes_back(
    deployment: Deployment, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    before = total_now(deployment.url, "transfers")
    (victim,) = (
        process
        for process in psutil.Process(deployment.process.pid).children(recursive=True)
        if "prefill-0/rank-0" in process.cmdline()
    )
    victim.kill()
    await_true(lambda: pulled_again(deployment, prompts[-1], before), "a pull from the new rank")
    assert [
        complete(deployment.url, prompt, NUM_TOKENS, cache_salt="again") for prompt in prompts
    ] == expected
    await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def pulled_again(deployment: Deployment, prompt: list[int], before: float) -> bool:
    """Asks until an answer has come over the connector; a salt for each question keeps the prefix
    cache out.
    """
    complete(deployment.url, prompt, 2, cache_salt=random.random().hex())
    return total_now(deployment.url, "transfers") > before
