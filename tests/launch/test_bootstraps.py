"""Each child is given what it needs, and no more."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines.plan import kind_of, plan_processes
from pdlaunch.launch.ports import listening
from pdlaunch.planning.hosts import ResolvedHost
from pdlaunch.planning.resolve import ResolvedLaunch, resolve, resolve_on
from pdlaunch.planning.roles import EnginePlace
from pdlaunch.protocol.sockets import new_launch_keys
from tests.planning.test_resolve import CPU, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", dtype="bfloat16")


def prepared(
    resolved: ResolvedLaunch, run_dir: Path, listeners: Sequence[socket.socket]
) -> Bootstraps:
    bootstraps = Bootstraps(
        resolved,
        keys=new_launch_keys(),
        control="ipc:///c",
        run_dir=run_dir,
        launch_id="l",
        listeners=listeners,
        kind=kind_of(resolved),
    )
    bootstraps.prepare()
    return bootstraps


def test_children_are_given_what_is_theirs(model: Path, tmp_path: Path) -> None:
    config = LaunchConfig.model_validate({"model": str(model), "port": 0, "api_key": "secret"})
    with listening("127.0.0.1", 0) as listeners:
        resolved = resolve(config, {"here": CPU}, {})
        bootstraps = prepared(resolved, tmp_path, listeners)
        rank, _, server, _, router = plan_processes(resolved).processes
        of_rank, of_server, of_router = (
            bootstraps.make(rank, 2),
            bootstraps.make(server, 1),
            bootstraps.make(router, 2),
        )
        assert of_rank.engine().name == "prefill-0"
        assert of_rank.rendezvous == f"file://{tmp_path}/prefill-0.tp.2"
        assert of_server.engine() == of_rank.engine()
        assert (of_rank.router, of_server.router, of_router.engine_json) == (None, None, None)
        assert of_router.router is not None
        assert of_router.router.port == listeners[0].getsockname()[1]
        assert of_router.router.listeners == (listeners[0].fileno(),)
        assert of_router.router.api_key == "secret"


def test_children_are_given_the_addresses_of_their_host(model: Path, tmp_path: Path) -> None:
    """Also those of an engine that has moved, or whose host has come back elsewhere."""
    config = LaunchConfig.model_validate(
        {
            "model": str(model),
            "placement_strategy": "spread",
            "decode": {"tensor_parallel_size": 2},
        }
    )
    hosts = [
        ResolvedHost("local", CPU, {}, "10.0.0.1", "10.0.0.1", frozenset()),
        ResolvedHost("a", CPU, {}, "10.0.0.2", "192.0.2.2"),
        ResolvedHost("b", CPU, {}, "fd00::3", "fd00::3"),
    ]
    with listening("127.0.0.1", 0) as listeners:
        resolved = resolve_on(config, hosts, {})
        bootstraps = prepared(resolved, tmp_path, listeners)

        def given(name: str) -> tuple[str, str, str]:
            (process,) = [one for one in plan_processes(resolved).processes if one.name == name]
            made = bootstraps.make(process, 1)
            spec = made.engine()
            return spec.bind_address, spec.advertise_address, made.rendezvous

        assert given("prefill-0/rank-0")[:2] == ("10.0.0.2", "192.0.2.2")
        ranks = {given(f"decode-0/rank-{rank}") for rank in (0, 1)}
        assert ranks == {("fd00::3", "fd00::3", f"file://{tmp_path}/decode-0.tp.1")}
        resolved = resolved.with_places({**resolved.places, ("prefill", 0): EnginePlace("b")})
        prefill = next(one for one in resolved.engines if one.name == "prefill-0")
        bootstraps.adopt(resolved, prefill)
        assert given("prefill-0/rank-0")[:2] == ("fd00::3", "fd00::3")
        for name in ("prefill-0.tp.1", "prefill-0.sock", "prefill-00.sock", "admin.sock"):
            (tmp_path / name).touch()
        bootstraps.forget("prefill-0")
        assert {path.name for path in tmp_path.iterdir()} >= {"prefill-00.sock", "admin.sock"}
        assert not list(tmp_path.glob("prefill-0.*"))
        bootstraps.adopt(resolved, prefill)
        resolved = resolved.with_host(ResolvedHost("b", CPU, {}, "10.0.0.9", "10.0.0.9"))
        bootstraps.adopt(resolved)
        assert given("prefill-0/rank-0")[:2] == ("10.0.0.9", "10.0.0.9")


@pytest.mark.parametrize("is_spread", [True, False])
def test_sidecars_open_engines_where_a_launch_has_several_hosts(
    model: Path, tmp_path: Path, is_spread: bool
) -> None:
    placement = {"placement": "hosts", "hosts": "a"} if is_spread else {}
    config = LaunchConfig.model_validate(
        {
            "model": str(model),
            "engine": "vllm",
            "engine_api_key": "k",
            "prefill": {"port": 8200},
            "limits": {"max_body_bytes": 5000},
            "kv_transfer": {"data_ports": "4000-4099"},
            **placement,
        }
    )
    hosts = [ResolvedHost("local", CPU, {}, "10.0.0.1", "10.0.0.1", frozenset())]
    hosts += [ResolvedHost("a", CPU, {}, "10.0.0.2", "192.0.2.2")]
    with listening("127.0.0.1", 0) as listeners:
        resolved = resolve_on(config, hosts if is_spread else [ResolvedHost("local", CPU, {})], {})
        bootstraps = prepared(resolved, tmp_path, listeners)
        prefill, _, router = plan_processes(resolved).processes
        door = bootstraps.make(prefill, 1).door
        assert bootstraps.make(router, 1).door is None
    # On one host the router talks to vLLM itself.
    assert ("--port" in prefill.command) is not is_spread
    assert (door is not None) is is_spread
    if door is not None:
        assert (door.bind_address, door.advertise_address, door.port) == (
            "10.0.0.2",
            "192.0.2.2",
            8200,
        )
        assert (door.data_ports, door.max_body_bytes) == ("4000-4099", 5000)
