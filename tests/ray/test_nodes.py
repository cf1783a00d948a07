"""Nodes of Ray on hosts of their own, each with its own address, as ``ray start`` makes them."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import clean_environ
from tests.e2e.tiny_models import TWO_HEADS, make_tiny_model
from tests.e2e.waiting import await_true
from tests.netns.hosts import Host, Network, new_network, signal_inner, why_not
from tests.netns.launch import (
    ANSWER,
    PORT,
    QUESTION,
    STAND_IN,
    FarLaunch,
    is_healthy,
    pdlaunch,
    shared_folder,
    stand_in,
    wait_for,
)

pytestmark = pytest.mark.hosts_long
TIMEOUT_S = 240.0
HEAD_PORT = 6379
TOKEN = "/tmp/token"
HEAD = ("--head", "--num-cpus", "0", "--port", str(HEAD_PORT), "--include-dashboard", "false")
SETTINGS = {
    "model": "/tmp/llama",
    "device": "cpu",
    "placement": "ray",
    "placement_strategy": "spread",
    "kv_transfer": {"trusted_network": True},
    "port": PORT,
}


def environ() -> dict[str, str]:
    """The environment of nodes, and of a launch, on a cluster that asks for its token."""
    return clean_environ() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN}


@contextlib.contextmanager
def ray_node(host: Host, *flags: str) -> Iterator[None]:
    words = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *flags)
    own = ("--node-ip-address", host.address, "--object-store-memory", str(100 << 20))
    host.file(TOKEN).write_text("2" * 64)
    with (
        host.file("/tmp/node.out").open("wb") as output,
        host.running(
            *words,
            *own,
            "--disable-usage-stats",
            env=environ(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ),
    ):
        yield


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Network]:
    """A head without cores on a, and nodes on b and c, with one core each by default."""
    num_cpus = getattr(request, "param", 1)
    pytest.importorskip("ray", reason="make test-ray installs it")
    if reason := why_not():
        pytest.skip(reason)
    with new_network("a", "b", "c") as network, contextlib.ExitStack() as stack:
        head = network["a"]
        make_tiny_model("llama", head.file("/tmp"))
        stack.enter_context(ray_node(head, *HEAD))
        await_true(
            lambda: HEAD_PORT in {each.port for each in head.listening()},
            head.file("/tmp/node.out").read_text,
        )
        for name in ("b", "c"):
            shutil.copytree(head.file("/tmp/llama"), network[name].file("/tmp/llama"))
            address = f"{head.address}:{HEAD_PORT}"
            flags = ("--num-cpus", str(num_cpus), "--address", address)
            stack.enter_context(ray_node(network[name], *flags))
        yield network


def of_the_launch(nodes: Network) -> list[list[str]]:
    found = []
    for process in (each for host in nodes.hosts for each in host.processes()):
        with contextlib.suppress(psutil.Error):  # It has ended.
            if "pdlaunch" in process.cmdline():
                found.append(process.cmdline())
    return found


def test_engines_on_nodes_with_addresses_of_their_own(nodes: Network) -> None:
    with served(nodes, SETTINGS) as launch:
        urls = {engine["name"]: engine["url"] for engine in launch.status()["engines"]}
        assert {url.rpartition(":")[0] for url in urls.values()} == {
            f"https://{nodes[name].address}" for name in ("b", "c")
        }
        before = nodes.num_bytes("b", "c") + nodes.num_bytes("c", "b")
        right = answer(launch)
        assert nodes.num_bytes("b", "c") + nodes.num_bytes("c", "b") > before
        assert answer(launch) == right


@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_an_engine_over_two_nodes(nodes: Network) -> None:
    """The engine is a stand-in for vLLM."""
    with shared_folder() as folder:
        settings = {
            # A node has three cores: two of these fit on none.
            "prefill": {"tensor_parallel_size": 2, "nnodes": 2, "num_threads": 2},
            "routing": {"policy": "pairs"},
        }
        with served(nodes, SETTINGS | settings | stand_in(folder, **TWO_HEADS)) as launch:
            (first, other) = (ranks_on(nodes[name]) for name in ("b", "c"))
            assert {*first, *other} == {"0", "1"}
            assert len(first) == len(other) == 1
            assert answer(launch) == ANSWER


def ranks_on(host: Host) -> list[str]:
    commands = [each.cmdline() for each in host.find(STAND_IN, "--node-rank")]
    return [words[words.index("--node-rank") + 1] for words in commands]


@contextlib.contextmanager
def served(nodes: Network, settings: Mapping[str, Any]) -> Iterator[FarLaunch]:
    """Run a launch from the head, ready inside the block; nothing is left at its end."""
    head = nodes["a"]
    head.file("/tmp/launch.yaml").write_text(json.dumps(settings))
    cluster = environ() | {"RAY_ADDRESS": f"{head.address}:{HEAD_PORT}"}
    with pdlaunch(head, "serve", "serve", "/tmp/launch.yaml", environ=cluster) as serve:
        launch = FarLaunch(nodes, head, serve, contextlib.ExitStack())
        wait_for(lambda: is_healthy(launch), launch, "not ready")
        yield launch
        signal_inner(serve, signal.SIGTERM)
        assert serve.wait(240) == 0
    await_true(lambda: not of_the_launch(nodes), lambda: str(of_the_launch(nodes)))


def answer(launch: FarLaunch) -> list[int]:
    (found,) = launch.ask(QUESTION | {"temperature": 0})
    assert isinstance(found, dict), found
    return list(found["choices"][0]["token_ids"])
