"""A prefill engine of vLLM whose two ranks are on two hosts of namespaces; decode is on one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tiny_models import TWO_HEADS, make_tiny_model
from tests.netns.hosts import new_network, why_not
from tests.netns.launch import FarLaunch, far_launch, wait_for
from tests.vllm.conftest import START_TIMEOUT_S
from tests.vllm.kv_memory import FAILED
from tests.vllm.test_far_hosts import metric, tokens_of

pytestmark = pytest.mark.vllm_long
PROMPTS = [[(seed * 7 + place * 3) % 200 + 40 for place in range(150)] for seed in range(3)]


@pytest.fixture(scope="module")
def launch(vllm_command: str) -> Iterator[FarLaunch]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="pdlaunch-test-", dir="/var/tmp"))
    config = {
        "model": str(make_tiny_model("llama", folder, **TWO_HEADS)),
        "engine": "vllm",
        "engine_command": vllm_command,
        "max_model_len": 512,
        "enforce_eager": True,
        "prefill": {"tensor_parallel_size": 2, "nnodes": 2},
        "routing": {"policy": "pairs"},
        "hosts": [{"name": "local"}, {"name": "b"}],
        "kv_transfer": {"trusted_network": True},
        # The first request has vLLM compile kernels, which a host of namespaces has not kept.
        "env": {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")},
        "hang_timeout_s": START_TIMEOUT_S,
        "startup_timeout_s": START_TIMEOUT_S,
    }
    allowed, timeout_s = [vllm_command], START_TIMEOUT_S
    with (
        new_network("a", "b") as network,
        far_launch(network, config, ["b"], allow=allowed, timeout_s=timeout_s) as launch,
    ):
        yield launch
    shutil.rmtree(folder)


def tokens(launch: FarLaunch, prompt: list[int], engine: str = "") -> list[int]:
    question = {
        "model": "llama",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    (answer,) = launch.ask_alone(engine, question) if engine else launch.ask(question)
    return tokens_of(answer)


def test_tokens_are_those_of_one_rank_and_half_of_the_heads_come_from_the_other_host(
    launch: FarLaunch,
) -> None:
    decode = next(e for e in launch.status()["engines"] if e["name"] == "decode-0")
    there, here = ("b", "a") if decode["host"] == "local" else ("a", "b")
    for prompt in PROMPTS:
        passed = launch.network.num_bytes(there, here)
        found = tokens(launch, prompt)
        assert launch.network.num_bytes(there, here) - passed > 100_000
        assert found == tokens(launch, prompt, "decode-0")
    assert metric(launch, *FAILED) == 0
    assert metric(launch, "pdlaunch_router_silent_recomputes_total") == 0


def test_it_comes_back_whole_when_the_rank_of_the_other_host_is_killed(launch: FarLaunch) -> None:
    far = [each for each in launch.network["b"].processes() if "--headless" in each.cmdline()]
    next(each for each in far if "pdlaunch.launch.sidecar" not in each.cmdline()).kill()
    again = "prefill-0 is ready again (incarnation 2)"
    wait_for(lambda: again in launch.output(), launch, "it is not back", START_TIMEOUT_S)
    assert tokens(launch, PROMPTS[0]) == tokens(launch, PROMPTS[0], "decode-0")
