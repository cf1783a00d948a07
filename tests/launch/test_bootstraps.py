"""Each child is given what it needs, and no more."""

import hashlib
from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.machine.network import listening
from pdlaunch.planning.plan import ResolvedHost
from pdlaunch.planning.resolve import resolve_on
from pdlaunch.protocol.process.bootstrap import Bootstrap, ClientKey
from pdlaunch.protocol.sockets import new_launch_keys
from tests.planning.test_resolve import CPU, write_model

LOCAL = ResolvedHost("local", CPU, {})
HOSTS = (
    ResolvedHost("local", CPU, {}, "10.0.0.1", "10.0.0.1", frozenset()),
    ResolvedHost("a", CPU, {}, "10.0.0.2", "192.0.2.2"),
    ResolvedHost("b", CPU, {}, "fd00::3", "fd00::3"),
)


class Prepared:
    def __init__(self, folder: Path, *hosts: ResolvedHost, **settings: object) -> None:
        model = write_model(folder / "tiny", dtype="bfloat16")
        config = LaunchConfig.model_validate({"model": str(model), "port": 0, **settings})
        self.resolved = resolve_on(config, hosts, {})
        self.bootstraps = Bootstraps(
            kind_of(self.resolved), new_launch_keys(), "ipc:///c", folder, "l", listeners=[]
        )

    def make(self, name: str, incarnation: int = 1) -> Bootstrap:
        specs = {spec.name: spec for spec in plan_processes(self.resolved).processes}
        return self.bootstraps.make(specs[name], incarnation, self.resolved)


def test_children_are_given_what_is_theirs(tmp_path: Path) -> None:
    limited = {"name": "a", "sha256": "0" * 64, "weight": 2, "max_concurrent": 3}
    settings = {
        "api_key": "secret",
        "api_keys": [limited],
        "allowed_hosts": ["a"],
        "limits": {"max_connections": 7},
    }
    launch = Prepared(tmp_path, LOCAL, routing={"policy": "pairs"}, **settings)
    rank, server = launch.make("prefill-0/rank-0", 2), launch.make("prefill-0")
    assert rank.engine().name == "prefill-0"
    assert rank.rendezvous == f"file://{tmp_path}/prefill-0.tp.2"
    assert server.engine() == rank.engine()
    with listening("127.0.0.1", 0) as launch.bootstraps.listeners:
        port = launch.bootstraps.listeners[0].getsockname()[1]
        of_router = launch.make("router", 2)
    assert (rank.router, server.router, of_router.engine_json) == (None, None, None)
    router = of_router.router
    assert router is not None
    assert (router.port, len(router.listeners)) == (port, 1)
    own = hashlib.sha256(b"secret").hexdigest()
    assert router.keys == (
        ClientKey(**limited),
        ClientKey(name="api_key", sha256=own, max_concurrent=768),
    )
    assert router.allowed_hosts == ("a",)
    assert (router.max_connections, router.routing) == (7, "pairs")
    assert router.served_model_name == "tiny"


def test_children_are_given_the_addresses_of_their_host(tmp_path: Path) -> None:
    """Also those of an engine whose host has come back elsewhere."""
    settings = {"placement_strategy": "spread", "decode": {"tensor_parallel_size": 2}}
    launch = Prepared(tmp_path, *HOSTS, **settings)

    def given(name: str) -> tuple[str, str]:
        spec = launch.make(name).engine()
        return spec.bind_address, spec.advertise_address

    assert given("prefill-0/rank-0") == ("10.0.0.2", "192.0.2.2")
    assert given("decode-0/rank-0") == given("decode-0/rank-1") == ("fd00::3", "fd00::3")
    back = ResolvedHost("a", CPU, {}, "10.0.0.9", "10.0.0.9")
    launch.resolved = launch.resolved.with_host(back)
    assert given("prefill-0/rank-0") == ("10.0.0.9", "10.0.0.9")
    for name in ("prefill-0.tp.1", "prefill-0.sock", "prefill-00.sock", "admin.sock"):
        (tmp_path / name).touch()
    launch.bootstraps.forget("prefill-0")
    assert {path.name for path in tmp_path.iterdir()} == {"prefill-00.sock", "admin.sock", "tiny"}


@pytest.mark.parametrize("is_spread", [True, False])
def test_sidecars_open_engines_where_a_launch_has_several_hosts(
    tmp_path: Path, is_spread: bool
) -> None:
    settings = {
        "engine": "vllm",
        "engine_api_key": "k",
        "prefill": {"port": 8200},
        "limits": {"max_body_bytes": 5000},
        "kv_transfer": {"data_ports": "4000-4099"},
        **({"placement": "hosts", "hosts": "a"} if is_spread else {}),
    }
    launch = Prepared(tmp_path, *(HOSTS[:2] if is_spread else [LOCAL]), **settings)
    prefill, door = plan_processes(launch.resolved).processes[0], launch.make("prefill-0").door
    # On one host the router talks to vLLM itself.
    assert ("--port" in prefill.command) is not is_spread
    assert (door is not None) is is_spread
    if door is not None:
        assert (door.bind_address, door.advertise_address) == ("10.0.0.2", "192.0.2.2")
        assert (door.port, door.data_ports, door.max_body_bytes) == (8200, "4000-4099", 5000)
