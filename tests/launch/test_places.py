"""Engines of a lost host wait until it is back; new engines go where there is room."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.launch.places import EnginePlaces
from pdlaunch.launch.state import Observed, Pairs
from pdlaunch.launch.status import ProcessState
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.plan import ResolvedHost
from pdlaunch.planning.resolve import resolve, resolve_on
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.control import ChangeEngines
from tests.config.model_files.files import tiny_model
from tests.launch.fakes import pair_ready


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return tiny_model(tmp_path)


TWO_GPUS = Machine(num_cpus=2, gpus=(Gpu(0, has_fabric_handles=False), Gpu(1)))
FOUR_CORES = Machine(num_cpus=4, memory_bytes=64 << 30)


class Deployment:
    """A launch over hosts a, b and c whose processes all run."""

    def __init__(self, machine: Machine = FOUR_CORES, **settings: Any) -> None:
        config = LaunchConfig.model_validate(
            {
                "load_format": "dummy",
                "kv_transfer": {"trusted_network": True},
                "placement": "hosts",
                "hosts": "a,b,c",
                **settings,
            }
        )
        hosts = [
            ResolvedHost("local", Machine(), {}, "10.0.0.1", "10.0.0.1", frozenset()),
            *(
                ResolvedHost(name, machine, {}, address, address)
                for name, address in (("a", "10.0.0.2"), ("b", "10.0.0.3"), ("c", "10.0.0.4"))
            ),
        ]
        self.launch = resolve_on(config, hosts, {})
        plan, kind = plan_processes(self.launch), kind_of(self.launch)
        self.seen = Observed(Pairs(plan, kind), 0.0)
        self.seen.add(plan.processes)
        for process in self.seen.processes():
            process.begin(1)
            process.state = ProcessState.READY
        self.now = 100.0
        names = {host.name for host in hosts}
        self.places = EnginePlaces(self.launch, kind, names, clock=lambda: self.now)

    def lose(self, host: str, ended_by: float | None = None) -> None:
        self.places.lost(host, ended_by)
        for process in self.seen.processes():
            if process.spec.host == host:
                process.state = ProcessState.FAILED

    @property
    def serving(self) -> set[str]:
        return {name for name, engine in self.seen.engines.items() if engine.ready}

    def placed(self, name: str) -> PlacedEngine:
        return next(engine for engine in self.launch.engines if engine.name == name)

    def find(self, engine: str) -> str | None:
        units = [unit for unit in self.seen.units if unit.engine == engine]
        found = [self.places.is_there(unit) for unit in units]
        assert len(set(found)) == 1
        (host,) = {member.spec.host for unit in units for member in unit.processes}
        return host if found[0] else None


SPREAD = {"placement_strategy": "spread"}
WIDE = {"tensor_parallel_size": 2, "nnodes": 2}


def test_an_engine_of_a_lost_host_waits_for_it_and_for_the_end_of_what_may_run_there() -> None:
    deployment = Deployment(**SPREAD)
    host = deployment.launch.host("b")
    deployment.lose("b", ended_by=deployment.now + 30)
    assert (deployment.find("decode-0"), deployment.find("prefill-0")) == (None, "a")
    deployment.now += 60
    assert deployment.find("decode-0") is None
    deployment.places.joined(host)
    assert deployment.find("decode-0") == "b"


def test_a_host_that_is_back_at_another_address_may_be_another_machine() -> None:
    deployment = Deployment(**SPREAD)
    host = deployment.launch.host("b")
    deployment.lose("b", ended_by=deployment.now + 30)
    deployment.places.joined(replace(host, advertise_address="10.0.0.9"))
    assert deployment.find("decode-0") is None
    deployment.now += 30
    assert deployment.find("decode-0") == "b"
    deployment.places.lost("b", deployment.now + 30)
    deployment.places.joined(replace(host, advertise_address="10.0.0.9"))
    assert deployment.find("decode-0") == "b", "its agent has ended what it ran"


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_engines_of_a_host_that_is_back_elsewhere_get_its_address(engine: str) -> None:
    deployment = Deployment(engine=engine, **SPREAD)

    def addresses() -> dict[str, str]:
        return {
            process.spec.engine: process.spec.environment["UCX_NET_DEVICES"]
            for process in deployment.seen.processes()
            if "UCX_NET_DEVICES" in process.spec.environment
        }

    before = addresses()
    assert (before["prefill-0"], before["decode-0"]) == ("10.0.0.2", "10.0.0.3")
    deployment.lose("b")
    host = deployment.launch.host("b")
    deployment.places.joined(replace(host, bind_address="10.0.0.9", advertise_address="10.0.0.9"))
    assert deployment.find("decode-0") == "b"
    assert deployment.find("prefill-0") == "a"
    assert addresses() == before | {"decode-0": "10.0.0.9"}
    environments = [process.spec.environment for process in deployment.seen.processes()]
    told = {each.get("VLLM_NIXL_SIDE_CHANNEL_HOST") for each in environments}
    assert told >= ({"10.0.0.2", "10.0.0.9"} if engine == "vllm" else {None})


def test_all_ranks_of_an_engine_over_hosts_meet_where_its_first_host_is_now() -> None:
    deployment = Deployment(engine="vllm", prefill=WIDE, **SPREAD)
    host = deployment.launch.host("a")
    deployment.lose("a")
    deployment.places.joined(replace(host, bind_address="10.0.0.9", advertise_address="10.0.0.9"))
    (unit,) = (each for each in deployment.seen.units if each.engine == "prefill-0")
    assert deployment.places.is_there(unit)
    for process in unit.processes:
        command = process.spec.command
        assert command[command.index("--master-addr") + 1] == "10.0.0.9"


def test_an_engine_over_hosts_needs_room_on_each_of_them() -> None:
    settings = {"engine": "vllm", "prefill": WIDE, "placement_strategy": "spread"}
    deployment = Deployment(replace(TWO_GPUS, gpus=TWO_GPUS.gpus[:1]), **settings)
    lacking = "needs 1 free GPU of each of 2 hosts, .* a has 1, GPU 0 used by prefill-0; b has 1"
    with pytest.raises(ConfigError, match=lacking):
        plan(deployment, prefill=2)
    roomy = Deployment(TWO_GPUS, **settings)
    assert plan(roomy, prefill=2).keys() == {"prefill-1"}


def test_devices_that_a_host_names_for_its_ranks_are_kept() -> None:
    deployment = Deployment(engine="vllm", prefill=WIDE, **SPREAD)
    first = deployment.placed("prefill-0").engines
    named = replace(first, on=replace(first.on, environ={"NCCL_SOCKET_IFNAME": "ib0"}))
    before, after = first.environment, named.environment
    assert before["NCCL_SOCKET_IFNAME"] == before["GLOO_SOCKET_IFNAME"] == "10.0.0.2"
    assert "NCCL_SOCKET_IFNAME" not in after
    assert after["GLOO_SOCKET_IFNAME"] == "10.0.0.2"


def plan(deployment: Deployment, **replicas: int) -> dict[str, str]:
    wanted = ChangeEngines(question=1, replicas=replicas)
    change = deployment.places.plan(wanted, deployment.serving, ())
    return {engine.name: engine.host.name for engine in change.starts}


def test_new_engines_go_beside_their_peers_while_there_is_room(tiny: str) -> None:
    deployment = Deployment(replace(FOUR_CORES, num_cpus=3), model=tiny)
    assert {engine.host.name for engine in deployment.launch.engines} == {"a"}
    assert plan(deployment, decode=2) == {"decode-1": "a"}
    with pytest.raises(ConfigError, match=r"-0 would have to be restarted"):
        plan(deployment, decode=3)


def test_new_engines_take_free_gpus_of_hosts_that_are_there(tiny: str) -> None:
    deployment = Deployment(TWO_GPUS, **SPREAD, model=tiny)
    assert plan(deployment, decode=2) == {"decode-1": "a"}
    assert plan(deployment, prefill=2, decode=3) == {
        "prefill-1": "b",
        "decode-1": "a",
        "decode-2": "c",
    }
    deployment.places.lost("c", None)
    with pytest.raises(ConfigError, match="no room for decode-1, decode-2, decode-3"):
        plan(deployment, decode=4)


def test_a_new_engine_gets_no_name_that_may_run_on_a_host_that_is_cut_off(tiny: str) -> None:
    deployment = Deployment(**SPREAD, model=tiny, decode={"replicas": 2})
    lost = deployment.placed("decode-0").host.name
    deployment.lose(lost, ended_by=deployment.now + 30)
    wanted = ChangeEngines(question=1, replicas={"decode": 1})
    assert deployment.places.plan(wanted, deployment.serving, ()).planned.stops == {"decode-0": 0}
    deployment.places.forget("decode-0")
    deployment.seen.remove("decode-0")
    started = plan(deployment, decode=2)
    assert (started.keys(), lost in started.values()) == ({"decode-2"}, False)
    deployment.now += 30
    assert plan(deployment, decode=2).keys() == {"decode-0"}


@pytest.mark.parametrize("machine", [TWO_GPUS, FOUR_CORES], ids=["gpu", "cpu"])
def test_a_turned_engine_stays_on_its_host(machine: Machine, tiny: str) -> None:
    deployment = Deployment(machine, **SPREAD, model=tiny, prefill={"replicas": 2})
    for engine in ("prefill-0", "prefill-1"):
        before = deployment.placed(engine)
        wanted = ChangeEngines(question=1, engine=engine, role="decode")
        change = deployment.places.plan(wanted, deployment.serving, ())
        (turned,) = change.starts
        assert (turned.name, turned.host.name) == ("decode-1", before.host.name)


@pytest.mark.parametrize(
    ("machine", "settings", "speed", "words"),
    [
        (TWO_GPUS, {"enable_cumem_allocator": True}, 0.6, ["PD504 nixl/UCX", "map cumem memory"]),
        (TWO_GPUS, {"enable_cumem_allocator": True}, 300.0, []),
        (replace(TWO_GPUS, gpus=TWO_GPUS.gpus[:1]), {}, 0.3, ["between GPUs", "share a GPU"]),
        (FOUR_CORES, {"engine": "vllm"}, 0.05, ["PD504", "a tenth of 1"]),
        (FOUR_CORES, {"engine": "vllm"}, 0.5, []),
        (FOUR_CORES, None, 0.5, ["between a and b, less than a tenth of 6"]),
    ],
)
def test_a_measured_pair_is_judged_by_its_link(
    machine: Machine, settings: dict[str, Any] | None, speed: float, words: list[str]
) -> None:
    """``settings``: None for a launch over hosts."""
    places = Deployment(**SPREAD).places
    if settings is not None:
        launch = resolve(LaunchConfig.model_validate(settings), {"local": machine}, {})
        places = EnginePlaces(launch, kind_of(launch), {"local"})
    pair = pair_ready("decode-0/rank-0", "prefill-0/rank-0", 1)
    slow = places.judged(msgspec.structs.replace(pair, path="nixl/UCX", gigabytes_per_s=speed)).slow
    assert bool(slow) is bool(words)
    assert all(word in slow for word in words)
    assert ("share a GPU" in slow) is (len(machine.gpus) == 1)
