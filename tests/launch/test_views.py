"""Each process is told what concerns it of the registry; pairs are proven or missing."""

from __future__ import annotations

import msgspec

from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.engines.plan import with_peers
from pdlaunch.launch.hosts.host import MessageReceived
from pdlaunch.launch.pairs import Pairs
from pdlaunch.launch.registry import next_registry
from pdlaunch.launch.state import Desired, Observed, Timing
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import PairReady, Ready, Register, Registry
from pdlaunch.protocol.due_pairs import MAX_PEERS
from tests.launch.fakes import World, make_plan, pair_ready

ENGINES = ("prefill-0", "decode-0")


def test_a_new_version_for_every_change_and_none_without() -> None:
    seen, wanted = Observed([], Pairs(make_plan(), NativeEngine()), 0.0), Desired(Timing())
    first = Registry(version=0, entries=[], serving=False)
    assert next_registry(first, wanted, seen) is first
    seen.was_ready = True
    second = next_registry(first, wanted, seen)
    assert (second.version, second.serving) == (1, True)
    assert next_registry(second, wanted, seen) is second
    seen.pairs.add(to_rank(0, num_peers=1))
    third = next_registry(second, wanted, seen)
    assert (third.version, third.pairs) == (2, [to_rank(0, num_peers=1)])


def to_rank(tp_rank: int, num_peers: int) -> PairReady:
    pair = pair_ready("decode-0/rank-0", f"prefill-0/rank-{tp_rank}", 0)
    return msgspec.structs.replace(pair, num_peers=num_peers)


def test_a_decode_rank_is_connected_with_its_last_pair() -> None:
    pairs = Pairs(make_plan(), NativeEngine())
    assert pairs.missing(ENGINES) == ["decode-0/rank-0 has no path to prefill-0"]
    pairs.add(to_rank(0, num_peers=1))
    assert pairs.missing(ENGINES) == []


def test_every_rank_of_the_prefill_engine_that_is_pulled_from_counts() -> None:
    plan = make_plan(tp_size=3)
    pairs = Pairs(plan, NativeEngine())
    for decode in ("decode-0/rank-1", "decode-0/rank-2"):
        pairs.add(pair_ready(decode, "prefill-0/rank-0", 0))
    pairs.add(to_rank(0, num_peers=3))
    pairs.fail("decode-0/rank-0", "prefill-0/rank-1", "the first READ failed")
    expected = "decode-0/rank-0 has a path to only 1 of 3 ranks of prefill-0: the first READ failed"
    assert pairs.missing(ENGINES) == [expected]
    pairs.add(to_rank(1, num_peers=3))
    assert pairs.missing(ENGINES) == [
        "decode-0/rank-0 has a path to only 2 of 3 ranks of prefill-0"
    ]
    pairs.add(to_rank(2, num_peers=3))
    assert pairs.missing(ENGINES) == []
    pairs.forget("prefill-0/rank-2")
    assert pairs.missing(ENGINES) != []


MANY = 3 * MAX_PEERS


def make_world(num_prefill: int, num_decode: int) -> World:
    *engines, router = make_plan(num_prefill=num_prefill, num_decode=num_decode).processes
    return World(Plan(processes=(*with_peers(engines), router))).start()


def peers_of(world: World, engine: str) -> set[str]:
    """Return the other engines that the rank of an engine was told of last."""
    entries = world.host.registry(f"{engine}/rank-0").entries
    return {entry.engine for entry in entries} - {engine, ""}


def is_ready(world: World) -> bool:
    return world.observer.ready_count == 1


def become_ready(world: World) -> None:
    """Have all processes get ready at once."""
    for name in world.host.running:
        world.supervisor.handle(MessageReceived(name, Register(name=name, incarnation=1, pid=1)))
        world.supervisor.handle(MessageReceived(name, Ready()))
    world.pass_time(0.0)


def connect_due_pairs(world: World) -> None:
    for decode in world.plan.ranks("decode"):
        for engine in decode.peers or ():
            pair = pair_ready(decode.name, f"{engine}/rank-0", 1)
            world.supervisor.handle(MessageReceived(decode.name, pair))
    world.pass_time(0.0)


def test_many_engines_are_told_of_their_peers_and_ready_with_the_pairs_among_them() -> None:
    world = make_world(MANY, MANY)
    become_ready(world)
    assert not is_ready(world)
    connect_due_pairs(world)
    assert is_ready(world)
    for engine in world.plan.engines("decode"):
        told = peers_of(world, engine)
        assert MAX_PEERS <= len(told) < MANY
        assert all(name.startswith("prefill") for name in told)
    # Only routers see all.
    assert len(world.host.registry("router").entries) == len(world.plan.processes)


def test_a_change_is_told_to_the_peers_and_the_router_alone() -> None:
    world = make_world(MANY, MANY)
    become_ready(world)
    connect_due_pairs(world)
    peers = peers_of(world, "prefill-3")
    world.host.sent.clear()
    world.exit("prefill-3/rank-0", 1)
    told = {name for name, message in world.host.sent if isinstance(message, Registry)}
    assert {name.partition("/")[0] for name in told} == peers | {"prefill-3", "router"}
    seen = world.host.registry(f"{min(peers)}/rank-0").entries
    assert "prefill-3/rank-0" not in {entry.name for entry in seen}


def test_a_proof_is_told_to_its_prover_and_the_router() -> None:
    world = make_world(MANY, MANY)
    become_ready(world)
    decode = world.plan.ranks("decode")[0]
    assert decode.peers is not None
    peer = f"{decode.peers[0]}/rank-0"
    world.host.sent.clear()
    world.connect(decode.name, peer)
    told = [name for name, message in world.host.sent if isinstance(message, Registry)]
    assert sorted(told) == sorted([decode.name, "router"])
    assert world.host.registry(decode.name).pairs == [pair_ready(decode.name, peer, 1)]


def test_it_tells_routers_which_engines_share_a_gpu() -> None:
    seen, wanted = Observed([], Pairs(make_plan(), NativeEngine()), 0.0), Desired(Timing())
    plan = make_plan(num_prefill=1, num_decode=2)
    gpus = {"prefill-0": "cuda:0", "decode-0": "cuda:0", "decode-1": "cuda:1"}
    seen.add(
        [
            msgspec.structs.replace(spec, devices=(gpus[spec.engine],))
            for spec in plan.processes
            if spec.kind == "rank"
        ]
    )
    for process in seen.processes():
        process.begin(1)
        process.registration = Register(name=process.name, incarnation=1, pid=1)
    registry = next_registry(Registry(version=0, entries=[]), wanted, seen)
    assert {entry.engine: entry.devices for entry in registry.entries} == {
        name: (gpu,) for name, gpu in gpus.items()
    }
