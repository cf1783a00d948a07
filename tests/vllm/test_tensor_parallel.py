"""Pairs of vLLM whose engines split the KV heads between other numbers of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import FAILED, total
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of

pytestmark = pytest.mark.vllm_long


@pytest.fixture(scope="module", params=[(1, 3), (3, 1)], ids=["1 and 3", "3 and 1"])
def launch(
    request: pytest.FixtureRequest, vllm_command: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """The demo model has 3 KV heads: one for each rank, or all for one."""
    sizes = dict(zip(("prefill", "decode"), request.param, strict=True))
    settings: dict[str, object] = {"dtype": "float32"}
    settings |= {role: {"tensor_parallel_size": size} for role, size in sizes.items()}
    with running_engines(tmp_path_factory.mktemp("tp"), vllm_command, settings) as deployment:
        yield deployment


def test_ranks_pull_their_heads_and_tokens_are_those_of_one_engine(launch: Deployment) -> None:
    alone = admin_api(launch.url).engine("prefill-0")
    for seed in range(500, 503):
        num_bytes = bytes_read(launch.url)
        told = complete(launch.url, prompt_of(seed), NUM_TOKENS)
        assert bytes_read(launch.url) > num_bytes
        assert told == complete(alone, prompt_of(seed), NUM_TOKENS, model="smollm2")
    metrics = Api(launch.url).metrics()
    assert total(metrics, FAILED) == 0
    assert metrics["pdlaunch_router_silent_recomputes_total"] == 0
