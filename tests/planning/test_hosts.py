"""Engines find room on hosts: beside each other, or spread; never more ranks than devices if any
host has room."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.models import LaunchConfig
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import ResolvedHost
from pdlaunch.planning.resolve import resolve_on
from pdlaunch.planning.roles import place_engines

FOUR = Machine(num_cpus=2, gpus=tuple(Gpu(index) for index in range(4)))


def room(name, num=4, roles=("prefill", "decode")):
    return {name: dict.fromkeys(roles, ("cuda", num))}


def placed(rooms, strategy="pack", **tp):
    replicas = {role: len(sizes) for role, sizes in tp.items()}
    sizes = {role: sizes[0] for role, sizes in tp.items()}
    places = place_engines(replicas, sizes, rooms, strategy)
    return {f"{role}-{index}": place.host for (role, index), (place,) in places.items()}


def test_the_two_sides_of_a_pair_share_a_host_while_there_is_room():
    places = placed(room("a") | room("b"), prefill=(2, 2), decode=(2, 2))
    assert places == {"prefill-0": "a", "decode-0": "a", "prefill-1": "b", "decode-1": "b"}


def test_spread_takes_the_emptiest_host():
    places = placed(room("a") | room("b") | room("c"), "spread", prefill=(1, 1), decode=(1,))
    assert places == {"prefill-0": "a", "decode-0": "b", "prefill-1": "c"}


def test_a_host_takes_engines_of_its_roles_alone():
    rooms = room("a", roles=("decode",)) | room("b", roles=("prefill",))
    assert placed(rooms, prefill=(1,), decode=(1,)) == {"prefill-0": "b", "decode-0": "a"}


def test_without_room_the_least_crowded_host_gets_the_engine():
    places = placed(room("a", 1) | room("b", 2), prefill=(1,) * 6)
    assert Counter(places.values()) == {"a": 2, "b": 4}


@given(
    devices=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    replicas=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    tp=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    strategy=st.sampled_from(["pack", "spread"]),
)
def test_devices_are_not_shared_while_any_host_has_room(devices, replicas, tp, strategy):
    free = {f"h{place}": num for place, num in enumerate(devices)}
    rooms = {name: room(name, num)[name] for name, num in free.items()}
    roles = ("prefill", "decode")
    sizes = dict(zip(roles, tp, strict=True))
    places = place_engines(dict(zip(roles, replicas, strict=True)), sizes, rooms, strategy)
    assert len(places) == sum(replicas)
    for (role, _), (place,) in places.items():
        if max(free.values()) >= sizes[role]:
            assert free[place.host] >= sizes[role]
        free[place.host] -= sizes[role]


def test_devices_are_counted_on_each_host():
    hosts = [
        ResolvedHost("local", Machine(), {}, roles=frozenset()),
        ResolvedHost("a", FOUR, {}, "10.0.0.2", "10.0.0.2"),
        ResolvedHost("b", FOUR, {"CUDA_VISIBLE_DEVICES": "2,3"}, "10.0.0.3", "10.0.0.3"),
    ]
    config = LaunchConfig.model_validate(
        {
            "placement_strategy": "spread",
            "prefill": {"replicas": 2, "tensor_parallel_size": 2},
            "decode": {"tensor_parallel_size": 2, "replicas": 1},
        }
    )
    models = dict.fromkeys(("prefill", "decode", "both"), Model("m", pending="later"))
    launch = resolve_on(config, hosts, {}, models)
    assert {
        engine.name: (engine.host.name, engine.device_indices) for engine in launch.engines
    } == {"prefill-0": ("a", (0, 1)), "prefill-1": ("a", (2, 3)), "decode-0": ("b", (0, 1))}
    assert [host.name for host in launch.engine_hosts] == ["a", "b"]
    on_a = launch.on_host(hosts[1])
    assert (on_a.roles["prefill"].num_ranks, on_a.roles["prefill"].num_ranks_on(3)) == (4, 1)
    assert on_a.has_pair, "rules on pairs still see both sides"
    assert launch.roles["decode"].num_threads == 1
