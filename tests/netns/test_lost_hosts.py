"""Hosts of a launch are lost and come back, and so does its supervisor: the tokens stay the same.

Prefill runs on b and decode on c; the supervisor and the router on a.
"""

import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import DEMO_ARGUMENTS
from tests.netns.hosts import Network, new_network, signal_inner
from tests.netns.launch import JOIN, PORT, FarLaunch, far_launch, pdlaunch, wait_for

TIMEOUT_S = 180.0
QUESTION = {
    "prompt": "Hello, my name is",
    "max_tokens": 8,
    "temperature": 0,
    "return_token_ids": True,
}
HOSTS = [{"name": "b"}, {"name": "c"}]
CONFIG = {
    "kv_transfer": {"trusted_network": True},
    "hosts": HOSTS,
    "placement_strategy": "spread",
    "agent_timeout_s": 8,
}


def tokens(launch: FarLaunch) -> list[int] | None:
    """The answer; None: there is none now."""
    (answer,) = launch.ask(QUESTION)
    return None if isinstance(answer, str) else list(answer["choices"][0]["token_ids"])


def places(launch: FarLaunch) -> dict[str, str]:
    return {
        engine["name"]: engine["host"]
        for engine in launch.status()["engines"]
        if engine["state"] == "ready"
    }


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with new_network("a", "b", "c", "stranger") as network:
        yield network


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    """The first answer, which those of all launches must be like."""
    return {}


def is_same(answer: dict[str, Any], found: list[int] | None) -> bool:
    return found is not None and answer.setdefault("tokens", found) == found


@pytest.mark.hosts_long
def test_engines_survive_agents_links_and_the_supervisor(
    network: Network, answer: dict[str, Any]
) -> None:
    with far_launch(network, CONFIG, ["b", "c"]) as launch:
        assert places(launch) == {"prefill-0": "b", "decode-0": "c"}
        assert is_same(answer, tokens(launch))

        # Another supervisor starts elsewhere, with a copy of its keys: agents obey the first.
        for file in (JOIN, f"{JOIN}.supervisor", "/tmp/launch.yaml"):
            copy = network["c"].file(file)
            copy.touch(0o600)
            copy.write_bytes(network["a"].file(file).read_bytes())
        words = ("serve", "/tmp/launch.yaml", *DEMO_ARGUMENTS, "--join-timeout", "5")
        elsewhere = (*words, "--control-address", network["c"].address)
        with pdlaunch(network["c"], "serve", *elsewhere) as second:
            assert second.wait(TIMEOUT_S) == 1
        assert "b, c did not join within 5 s" in network["c"].file("/tmp/serve.out").read_text()
        assert places(launch) == {"prefill-0": "b", "decode-0": "c"}
        assert is_same(answer, tokens(launch))

        # An agent is killed: its processes die with it, and the prefill engine serves alone.
        signal_inner(launch.agents["c"])
        assert psutil.wait_procs(network["c"].processes(), TIMEOUT_S)[1] == []
        wait_for(lambda: places(launch) == {"prefill-0": "b"}, launch, "not noticed")
        assert is_same(answer, tokens(launch))

        # The link is cut: the agent ends by itself, and nothing of the launch is left there.
        network.set_link("b", is_cut=True)
        assert launch.agents["b"].wait(TIMEOUT_S) == 1
        assert network["b"].processes() == []
        assert tokens(launch) is None, "an error, and no wrong answer"
        network.set_link("b")
        # The other supervisor has removed the join file of its host.
        network["c"].file(JOIN).touch(0o600)
        network["c"].file(JOIN).write_bytes(network["b"].file(JOIN).read_bytes())
        for name in ("b", "c"):
            launch.start_agent(name)
        wait_for(lambda: len(places(launch)) == 2, launch, "not back")
        assert is_same(answer, tokens(launch))

        # The supervisor is killed, and no other one follows.
        signal_inner(launch.serve)
        launch.serve.wait(TIMEOUT_S)
        assert [launch.agents[name].wait(TIMEOUT_S) for name in ("b", "c")] == [1, 1]
        for name in ("a", "b", "c"):
            assert network[name].processes() == []


@pytest.mark.hosts_long
def test_the_next_supervisor_serves_with_the_same_agents(
    network: Network, answer: dict[str, Any]
) -> None:
    with far_launch(network, CONFIG | {"agent_timeout_s": 60}, ["b", "c"]) as launch:
        signal_inner(launch.serve)
        launch.serve.wait(TIMEOUT_S)
        words = ("serve", "/tmp/launch.yaml", *DEMO_ARGUMENTS, "--port", str(PORT))
        with pdlaunch(launch.here, "serve", *words) as launch.serve:
            wait_for(lambda: is_same(answer, tokens(launch)), launch, "no answer")
            assert places(launch) == {"prefill-0": "b", "decode-0": "c"}
            signal_inner(launch.serve, signal.SIGTERM)
            launch.serve.wait(TIMEOUT_S)
        assert [agent.wait(TIMEOUT_S) for agent in launch.agents.values()] == [0, 0]
