"""Processes of a large launch are told of the engines that matter to theirs, and of no more."""

from __future__ import annotations

from pdlaunch.launch.engines.plan import with_peers
from pdlaunch.launch.hosts.host import MessageReceived
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import Ready, Register, Registry
from pdlaunch.protocol.due_pairs import MAX_PEERS
from tests.launch.fakes import World, make_plan, pair_ready

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
