"""A request that kills real ranks fails after two deaths. All requests in the same batch are
answered.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests.e2e.api import await_ready, complete, complete_all, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import default_environ, launched
from tests.e2e.faults import fault_variables, left_over
from tests.e2e.test_offload import HEALTHY
from tests.e2e.waiting import await_true

POISON = 199
PROMPTS = [list(range(40 + index, 100)) for index in range(4)]
NUM_TOKENS = 600


@pytest.fixture
def deployment(llama: Path) -> Iterator[Deployment]:
    """One prefill and one decode engine whose ranks have a bug."""
    environ = default_environ() | fault_variables(HEALTHY | {"poison": POISON})
    with launched(llama, "--kv-cache-memory", "4MiB", environ=environ) as deployment:
        yield deployment


def test_request_that_kills_fails_and_innocent_ones_are_answered(deployment: Deployment) -> None:
    expected = complete_all(
        deployment.url, PROMPTS, NUM_TOKENS, concurrency=len(PROMPTS), cache_salt="reference"
    )
    body = {"prompt": [*range(40, 90), POISON], "max_tokens": 5, "temperature": 0}
    with (
        ThreadPoolExecutor(len(PROMPTS)) as pool,
        streamed(deployment.url, PROMPTS[0], NUM_TOKENS) as token_ids,
    ):
        found = list(islice(token_ids, 3))
        others = [
            pool.submit(complete, deployment.url, prompt, NUM_TOKENS, cache_salt="new")
            for prompt in PROMPTS[1:]
        ]
        status, answer = Api(deployment.url).post("/v1/completions", body)
        found += token_ids
        assert [found, *(other.result() for other in others)] == expected
    assert (status, answer["error"]["code"]) == (500, "request_kills_engine")
    await_true(
        lambda: deployment.output().count("was killed by SIGSEGV") == 2, "both deaths are told"
    )
    await_ready(deployment.url)
    assert complete(deployment.url, PROMPTS[0], 8) == expected[0][:8]
    assert left_over(deployment) == []
