"""A launch on a cluster of Ray: placed, served, healed after the loss of a node, and gone at its
end.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.api import clients, states
from tests.e2e.client import Api, Deployment, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import lives
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true

TIMEOUT_S = 240.0
ARGUMENTS = ("--device", "cpu", "--placement", "ray", "--placement-strategy", "spread")
PROMPT = {"model": "llama", "prompt": [7] * 70, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def environ(cluster: Any) -> dict[str, str]:
    return clean_environ() | {"RAY_ADDRESS": cluster.address}


@contextlib.contextmanager
def launched(cluster: Any, model: Path, *arguments: str) -> Iterator[Deployment]:
    command = ("--model", str(model), *ARGUMENTS, "--agent-timeout", "10", *arguments)
    with running_deployment(command, environ=environ(cluster), timeout_s=TIMEOUT_S) as deployment:
        yield deployment


def agents() -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "agent" in line and "--name" in line and "pdlaunch" in line:
                found[line[line.index("--name") + 1]] = process
    return {name: process for name, process in found.items() if name.startswith("ray-")}


def node_of(cluster: Any, agent: psutil.Process) -> Any:
    """The node of the cluster on which an agent runs: its raylet started the actor."""
    above = {process.pid for process in agent.parents()}
    for node in cluster.worker_nodes:
        if any(started.process.pid in above for started in node.all_processes["raylet"]):
            return node
    raise AssertionError("no node has started this agent")


def answer(deployment: Deployment) -> str:
    status, found = Api(deployment.url, timeout_s=60).post("/v1/completions", PROMPT)
    assert status == 200, found
    return str(found["choices"][0]["text"])


def test_a_launch_is_placed_answers_and_heals_when_a_node_is_lost(
    cluster: Any, model: Path
) -> None:
    with launched(cluster, model) as deployment:
        joined = agents()
        assert joined.keys() == {"ray-prefill-0", "ray-decode-0"}
        nodes = {name: node_of(cluster, agent) for name, agent in joined.items()}
        assert nodes["ray-prefill-0"] is not nodes["ray-decode-0"]
        _, status = Api(deployment.url).get_object("/pdlaunch/status")
        hosts = {engine["name"]: engine["host"] for engine in status["engines"]}
        assert hosts == {"prefill-0": "ray-prefill-0", "decode-0": "ray-decode-0"}

        right = answer(deployment)

        def ask(*_: int) -> None:
            assert answer(deployment) == right

        with clients(1, ask):
            cluster.remove_node(nodes["ray-decode-0"], allow_graceful=False)
            is_ready = lambda: states(deployment.url).get("decode-0") == "ready"  # noqa: E731
            await_true(lambda: not is_ready(), "decode is lost", TIMEOUT_S)
            await_true(is_ready, "decode is back", TIMEOUT_S)
        again = node_of(cluster, agents()["ray-decode-0"])
        assert again not in nodes.values()
        assert answer(deployment) == right
        cluster.add_node(num_cpus=1)
        assert deployment.stop() == 0
    await_true(lambda: not agents(), "no agent is left")


def test_room_that_ray_does_not_have_is_told(cluster: Any, model: Path) -> None:
    command = [sys.executable, "-m", "pdlaunch", "serve", "--model", str(model), *ARGUMENTS]
    command += ["--port", "0", "--prefill", "9", "--join-timeout", "6"]
    done = subprocess.run(
        command,
        env=environ(cluster),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert "Ray has no room yet" in done.stdout + done.stderr
    assert "Ray has not placed the launch within 6 s" in done.stderr
    assert "ray-prefill-8 (CPU 1)" in done.stderr
    assert "of 3 CPU" in done.stderr


def test_nothing_is_left_when_the_supervisor_is_killed(cluster: Any, model: Path) -> None:
    with launched(cluster, model) as deployment:
        started = agents().values()
        children = [child for agent in started for child in agent.children(recursive=True)]
        assert children
        deployment.process.kill()
        psutil.wait_procs([*started, *children], timeout=TIMEOUT_S)
        assert not any(map(lives, (*started, *children)))
