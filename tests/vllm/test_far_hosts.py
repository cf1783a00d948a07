"""Engines of vLLM on two hosts of namespaces: prefill beside the router on a, decode on b."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.api import greedy_body
from tests.netns.hosts import new_network, why_not
from tests.netns.launch import FarLaunch, far_launch
from tests.netns.test_launch import doors_of
from tests.vllm.conftest import START_TIMEOUT_S
from tests.vllm.kv_memory import BYTES_READ, FAILED
from tests.vllm.test_pair import prompt_of

pytestmark = pytest.mark.vllm_long
HERE, THERE = {"name": "local", "roles": "prefill"}, {"name": "b", "roles": "decode"}
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def pair(vllm_command: str) -> Iterator[FarLaunch]:
    if reason := why_not():
        pytest.skip(reason)
    config = {
        "engine": "vllm",
        "engine_command": vllm_command,
        "max_model_len": 512,
        "enforce_eager": True,
        "hosts": [HERE, THERE],
        "kv_transfer": {"trusted_network": True},
        "startup_timeout_s": START_TIMEOUT_S,
    }
    with (
        new_network("a", "b", "stranger") as network,
        far_launch(
            network, config, ["b"], allow=[vllm_command], timeout_s=START_TIMEOUT_S
        ) as launch,
    ):
        yield launch


def question(seed: int, **fields: Any) -> dict[str, Any]:
    return greedy_body(prompt_of(seed), NUM_TOKENS) | fields


def tokens_of(answer: Any) -> list[int]:
    assert isinstance(answer, dict), answer
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def metric(pair: FarLaunch, *names: str) -> float:
    values = [
        float(line.rpartition(" ")[2])
        for line in pair.get("/metrics").splitlines()
        if line.startswith(tuple(f"{name}{end}" for name in names for end in "{ "))
    ]
    assert values, names
    return sum(values)


def assert_pulled(pair: FarLaunch, seed: int) -> None:
    """The tokens of a pair are those of a prefill engine alone, and KV went over the network."""
    read, passed = metric(pair, *BYTES_READ), pair.network.num_bytes("a", "b")
    (answer,) = pair.ask(question(seed))
    read = metric(pair, *BYTES_READ) - read
    # 150 tokens of 46 kB each, but those of the last block.
    assert read > 4_000_000
    assert pair.network.num_bytes("a", "b") - passed > read
    (alone,) = pair.ask_alone("prefill-0", question(seed, model="smollm2"))
    assert tokens_of(answer) == tokens_of(alone)


def test_tokens_are_those_of_one_engine_and_blocks_go_over_the_network(pair: FarLaunch) -> None:
    engines = {each["name"]: each for each in pair.status()["engines"]}
    assert {each["host"] for each in engines.values()} == {"local", "b"}
    assert all(each["url"].startswith("https://10.77.0.") for each in engines.values())
    for seed in range(3):
        assert_pulled(pair, seed)
    assert metric(pair, "pdlaunch_router_silent_recomputes_total") == 0
    assert metric(pair, *FAILED) == 0
    # They were proven: what prefill states has come from the other host.
    assert "used without proof" not in pair.log("decode-0.log")


def test_what_listens_is_documented_and_closed_to_strangers(pair: FarLaunch) -> None:
    """docs/hosts.md: TLS that asks for the token at the sidecar, UCX's ports in data_ports."""
    found: dict[str, list[str]] = {"a": [], "b": []}
    for (name, _), doors in doors_of(pair.network).items():
        found[name] += doors
    # Of each worker its side channel and one port of UCX; the supervisor's own for agents.
    assert {name: sorted(doors) for name, doors in found.items()} == {
        "a": ["curve 0", "curve 0", "data", "tls 401"],
        "b": ["curve 0", "data", "tls 401"],
    }
