"""``engine: vllm`` over two hosts, with a stand-in for its executable: doors, agents and healing.
``tests/vllm/test_far_hosts.py`` has the real one.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.faults import lives
from tests.netns.hosts import Network
from tests.netns.launch import STAND_IN, FarLaunch, far_launch, shared_folder, stand_in, wait_for
from tests.netns.test_launch import HERE, THERE, knock


@pytest.fixture
def config() -> Iterator[dict[str, Any]]:
    with shared_folder() as folder:
        yield {"hosts": [HERE, THERE]} | stand_in(folder)


def state(launch: FarLaunch, name: str) -> str:
    """An engine of which no process is there is not listed."""
    states = {each["name"]: each["state"] for each in launch.status()["engines"]}
    return str(states.get(name, "gone"))


def test_engines_behind_doors_serve_and_heal(network: Network, config: dict[str, Any]) -> None:
    allowed = [config["engine_command"]]
    with far_launch(network, config, ["b"], allow=allowed) as launch:
        for engine in launch.status()["engines"]:
            address = network["a" if engine["name"] == "prefill-0" else "b"].address
            assert engine["url"].startswith(f"https://{address}:")
            port = int(engine["url"].rpartition(":")[2])
            door = knock(network["stranger"], address, [port])[port]
            assert (door.kind, door.status) == ("tls", 401)
        launch.assert_answered()

        (engine,) = network["b"].find(STAND_IN)
        sidecar, *_ = network["b"].find("pdlaunch.launch.sidecar")
        engine.kill()
        wait_for(
            lambda: {each.pid for each in network["b"].find(STAND_IN)} - {engine.pid},
            launch,
            "no other one is started",
        )
        wait_for(lambda: state(launch, "decode-0") == "ready", launch, "it is not back")
        launch.assert_answered()
        assert not lives(sidecar)


def test_an_executable_that_the_agent_does_not_allow(
    network: Network, config: dict[str, Any]
) -> None:
    refused = pytest.raises(AssertionError, match="PD611")
    with refused as error, far_launch(network, config, ["b"]):
        pass
    assert "on b: " in str(error.value)
    assert "start that with --allow-executable vllm" in str(error.value)
