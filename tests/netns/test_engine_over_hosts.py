"""An engine over two hosts, with a stand-in for vLLM: after a fault on one host the whole engine
restarts, and other engines answer meanwhile.
``tests/vllm/test_engine_over_hosts.py`` has the real one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.e2e.faults import lives
from tests.e2e.tiny_models import TWO_HEADS
from tests.netns.hosts import new_network, signal_inner
from tests.netns.launch import STAND_IN, FarLaunch, far_launch, shared_folder, stand_in, wait_for
from tests.netns.switch import DEVICE

TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def launch() -> Iterator[FarLaunch]:
    config: dict[str, Any] = {
        "prefill": {"tensor_parallel_size": 2, "nnodes": 2},
        "routing": {"policy": "pairs"},
        "hosts": [
            {"name": "local", "roles": ["decode"]},
            {"name": "b", "roles": ["prefill"]},
            {"name": "c", "roles": ["prefill"]},
        ],
        "agent_timeout_s": 6,
        "hang_timeout_s": 5,
    }
    with shared_folder() as folder, new_network("a", "b", "c") as network:
        config |= stand_in(folder, **TWO_HEADS)
        allow = [config["engine_command"]]
        with far_launch(network, config, ["b", "c"], allow=allow) as launch:
            yield launch


@contextlib.contextmanager
def comes_back(launch: FarLaunch) -> Iterator[None]:
    """In this block the engine restarts once, on both hosts, and requests are answered."""
    old = stand_ins(launch)
    assert len(old) == 2
    num_starts = launch.output().count("prefill-0 is ready again")
    launch.assert_answered()
    yield
    launch.assert_answered()
    is_back = lambda: launch.output().count("prefill-0 is ready again") > num_starts  # noqa: E731
    wait_for(is_back, launch, "it is not back")
    assert launch.output().count("prefill-0 is ready again") == num_starts + 1
    assert not any(map(lives, old.values()))
    # Its pair is proven a moment later.
    wait_for(lambda: is_used(launch), launch, "its pair is not used")


def is_used(launch: FarLaunch) -> bool:
    routed = launch.log("router.log").count("route=prefill-0->decode-0")
    launch.assert_answered()
    return launch.log("router.log").count("route=prefill-0->decode-0") > routed


def stand_ins(launch: FarLaunch) -> dict[str, psutil.Process]:
    return {name: each for name in ("b", "c") for each in launch.network[name].find(STAND_IN)}


def headless(launch: FarLaunch) -> tuple[str, psutil.Process]:
    (found,) = (
        (name, each)
        for name in ("b", "c")
        for each in launch.network[name].find(STAND_IN, "--headless")
    )
    return found


def test_its_processes_are_told_their_own_addresses(launch: FarLaunch) -> None:
    name, process = headless(launch)
    told = process.environ()
    assert told["VLLM_HOST_IP"] == launch.network[name].address
    assert told["GLOO_SOCKET_IFNAME"] == DEVICE


def test_a_rank_is_killed(launch: FarLaunch) -> None:
    with comes_back(launch):
        headless(launch)[1].kill()


def test_the_sidecar_of_the_host_without_a_server_is_killed(launch: FarLaunch) -> None:
    name, _ = headless(launch)
    with comes_back(launch):
        (sidecar,) = launch.network[name].find("pdlaunch.launch.sidecar", "--headless")
        sidecar.kill()


@pytest.mark.hosts_long
def test_a_rank_is_stopped(launch: FarLaunch) -> None:
    with comes_back(launch):
        headless(launch)[1].suspend()


@pytest.mark.hosts_long
def test_the_link_between_its_hosts_is_cut(launch: FarLaunch) -> None:
    """The supervisor still reaches both hosts."""
    there = launch.network["c"].address
    with comes_back(launch):
        launch.network["b"].run("ip", "route", "add", "blackhole", f"{there}/32")
        launch.assert_answered()
        launch.network["b"].run("ip", "route", "del", "blackhole", f"{there}/32")


@pytest.mark.parametrize("name", ["b", "c"])
def test_an_agent_is_killed(launch: FarLaunch, name: str) -> None:
    with comes_back(launch):
        signal_inner(launch.agents[name])
        assert psutil.wait_procs(launch.network[name].processes(), TIMEOUT_S)[1] == []
        wait_for(lambda: not stand_ins(launch), launch, "its other host still runs it")
        launch.assert_answered()
        launch.start_agent(name)


def test_a_host_is_cut_off(launch: FarLaunch) -> None:
    name, _ = headless(launch)
    num_losses = launch.output().count(f"{name} is lost")
    with comes_back(launch):
        launch.network.set_link(name, is_cut=True)
        launch.assert_answered()
        assert launch.agents[name].wait(TIMEOUT_S) == 1
        assert launch.network[name].processes() == []
        wait_for(lambda: not stand_ins(launch), launch, "its other host still runs it")
        # Until then another agent of this name is refused.
        is_lost = lambda: launch.output().count(f"{name} is lost") > num_losses  # noqa: E731
        wait_for(is_lost, launch, "its host is not taken for lost")
        launch.network.set_link(name)
        launch.start_agent(name)
