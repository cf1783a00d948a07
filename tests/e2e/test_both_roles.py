"""Engines of role both without pairs, with real processes and a tiny model."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests.e2e.agreement import differences, engines_of
from tests.e2e.api import await_ready, complete, requests_in_flight, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import default_environ, launched
from tests.e2e.faults import paused, stop, tracebacks
from tests.e2e.tiny_models import greedy
from tests.e2e.waiting import await_true

PROMPTS = [list(range(start, start + 40)) for start in range(20, 28)]
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return greedy(llama, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def deployment(llama: Path) -> Iterator[Deployment]:
    with launched(llama, "--both", "2", environ=default_environ()) as deployment:
        yield deployment


def test_two_engines_share_the_requests_and_load_no_connector(
    deployment: Deployment, expected: list[list[int]]
) -> None:
    assert set(deployment.processes()) == {
        "router", "both-0", "both-1", "both-0/rank-0", "both-1/rank-0"
    }  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda prompt: complete(deployment.url, prompt, 16), PROMPTS)
    assert list(found) == [answer[:16] for answer in expected]
    page = Api(deployment.url).get("/metrics")[1]
    served = [line for line in page.splitlines() if line.startswith("pdlaunch_router_fallbacks_t")]
    assert served == ["pdlaunch_router_fallbacks_total 0.0"], "nothing else was wanted"
    for name, process in deployment.processes().items():
        mapped = [each.path for each in process.memory_maps() if "rank" in name]
        assert not [path for path in mapped if "nixl" in path or "libuc" in path]
    assert "2 both" in deployment.output()
    labels = [line.split()[:1] for line in deployment.output().splitlines()]
    assert ["topology"] in labels
    assert ["connector"] not in labels


def test_both_engines_answer_as_one_alone(deployment: Deployment) -> None:
    assert differences(deployment.url) == []


def test_a_killed_rank_loses_no_request(deployment: Deployment, expected: list[list[int]]) -> None:
    """The other engine continues the streams of the dead engine at the next token."""

    all_begun = threading.Barrier(len(PROMPTS) + 1)

    def read(prompt: list[int]) -> list[int]:
        with streamed(deployment.url, prompt, NUM_TOKENS) as token_ids:
            found = list(islice(token_ids, 5))
            all_begun.wait(180)
            return found + list(token_ids)

    def load() -> dict[str, int]:
        return {each["name"]: each["load"] for each in engines_of(Api(deployment.url))}

    before = deployment.processes()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        victim, other = (before[f"both-{number}/rank-0"] for number in range(2))
        # Ranks are paused until all requests are sent, so that these run at the same time.
        with paused(victim), paused(other):
            answers = [pool.submit(read, prompt) for prompt in PROMPTS]
            await_true(lambda: requests_in_flight(deployment.url) == len(PROMPTS), "all were sent")
        all_begun.wait(180)
        stop(victim)  # so that no stream ends before the kill
        assert load()["both-0"] > 0
        victim.kill()
        assert [answer.result() for answer in answers] == expected
    migrated = Api(deployment.url).metrics()["pdlaunch_router_migrations_total"]
    assert migrated >= 1
    await_ready(deployment.url)
    assert complete(deployment.url, PROMPTS[0], 16) == expected[0][:16]
    assert tracebacks(deployment) == {}
