"""``engine: vllm`` over two hosts, with a stand-in for its executable: doors, agents and healing.
``tests/vllm/test_far_hosts.py`` has the real one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.faults import lives
from tests.e2e.tiny_models import make_tiny_model
from tests.launch.sidecar.fake_vllm import answer_of
from tests.launch.sidecar.program import write_command
from tests.netns.hosts import Network
from tests.netns.launch import FarLaunch, far_launch, wait_for
from tests.netns.test_launch import HERE, THERE, knock

PROMPT = list(range(40, 140))
QUESTION = {"model": "llama", "prompt": PROMPT, "max_tokens": 5, "return_token_ids": True}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that all hosts share, as they do not share /tmp."""
    found = Path(tempfile.mkdtemp(prefix="pdlaunch-test-", dir="/var/tmp"))
    yield found
    shutil.rmtree(found)


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    return {
        "model": str(make_tiny_model("llama", folder)),
        "engine": "vllm",
        "engine_command": str(write_command(folder)),
        "hosts": [HERE, THERE],
        "kv_transfer": {"trusted_network": True},
        "env": {"FAKE_VLLM_FOLDER": str(folder)},
    }


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
        assert tokens(launch) == answer_of(PROMPT, 5)

        engine, sidecar = processes(network)
        engine.kill()
        wait_for(lambda: is_new(network, engine.pid), launch, "no other one is started")
        wait_for(lambda: state(launch, "decode-0") == "ready", launch, "it is not back")
        assert tokens(launch) == answer_of(PROMPT, 5)
        assert not lives(sidecar)


def test_an_executable_that_the_agent_does_not_allow(
    network: Network, config: dict[str, Any]
) -> None:
    refused = pytest.raises(AssertionError, match="PD611")
    with refused as error, far_launch(network, config, ["b"]):
        pass
    assert "on b: " in str(error.value)
    assert "start that with --allow-executable vllm" in str(error.value)


def tokens(launch: FarLaunch) -> list[int]:
    (answer,) = launch.ask(QUESTION)
    assert isinstance(answer, dict), answer
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def processes(network: Network) -> tuple[Any, Any]:
    """Return the stand-in on b, and its sidecar."""
    found = {each.pid: each for each in network["b"].processes()}
    sidecar = next(each for each in found.values() if "pdlaunch.launch.sidecar" in each.cmdline())
    (engine,) = (
        each for each in found.values() if "tests.launch.sidecar.program" in each.cmdline()
    )
    return engine, sidecar


def is_new(network: Network, old: int) -> bool:
    try:
        return bool(processes(network)[0].pid != old)
    except (StopIteration, ValueError, psutil.NoSuchProcess):
        return False
