"""Whole deployments with the other connectors. All other tests use the default connector."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.api import complete_all, idle, total_now
from tests.e2e.client import Deployment
from tests.e2e.conftest import launched
from tests.e2e.listening import await_unlocked_ports
from tests.e2e.tiny_models import greedy, make_prompts
from tests.e2e.waiting import await_true
from tests.mooncake import mooncake_problem

PROMPTS = make_prompts(3, (1, 15, 16, 17, 40, 64, 100, 200))
NUM_TOKENS = 8


@pytest.fixture(scope="module", params=["mooncake", "file"])
def deployment(
    request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Engines with TP 3 on one side and TP 1 on the other."""
    if request.param == "file":
        folder = str(tmp_path_factory.mktemp("kv"))
        arguments = ["--decode-tp", "3", "--kv-file-directory", folder]
    elif problem := mooncake_problem():
        pytest.skip(f"mooncake: {problem}")
    else:
        arguments = ["--prefill-tp", "3"]
    with launched(llama, "--kv-connector", request.param, *arguments) as deployment:
        yield deployment


def test_answers_are_those_of_the_model_and_their_blocks_were_pulled(
    deployment: Deployment, llama: Path
) -> None:
    expected = greedy(llama, PROMPTS, NUM_TOKENS)
    assert complete_all(deployment.url, PROMPTS, NUM_TOKENS, concurrency=4) == expected
    assert total_now(deployment.url, "kv_transfers") >= len(PROMPTS)
    assert total_now(deployment.url, "kv_transfer_failures") == 0
    await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def test_what_listens_without_asking_who_comes(deployment: Deployment) -> None:
    """Gloo listens in the TP group (PD425), and Mooncake at two ports of each rank (PD409)."""
    ranks = {name for name in deployment.processes() if "/rank-" in name}
    role = "prefill" if "decode-0/rank-1" not in ranks else "decode"
    of_mooncake = 2 if role == "prefill" else 0
    counts = {name: of_mooncake + name.startswith(f"{role}-0/") for name in ranks}
    await_unlocked_ports(deployment, {name: count for name, count in counts.items() if count})
