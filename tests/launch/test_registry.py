"""What happens is told to everybody whom it concerns; pairs are proven or missing."""

import signal

from pdlaunch.launch.engines import NativeEngine, with_peers
from pdlaunch.launch.hosts.local import MessageReceived
from pdlaunch.launch.state import Pairs
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import MAX_PEERS, Happened, PairFailed, Ready, Register, Registry
from tests.launch.fakes import World, make_plan, pair_ready, serving

RANK, PEER = "decode-0/rank-0", "prefill-0/rank-0"


def test_the_registry_goes_to_all_on_every_change_with_a_growing_version() -> None:
    world = World(make_plan()).start()
    world.register("router")
    world.register("prefill-0")
    assert [world.host.registry(name).version for name in ("router", "prefill-0")] == [2, 2]
    world.say("prefill-0", Ready())
    world.say("prefill-0", Ready())
    registry = world.host.registry("router")
    assert registry.version == 3, "none without a change"
    states = [(entry.name, entry.state) for entry in registry.entries]
    assert states == [("prefill-0", "ready"), ("router", "starting")]
    assert registry.withheld == "starting"


def test_the_router_hears_of_a_death_and_the_restart() -> None:
    world = serving()
    world.exit(RANK, -signal.SIGKILL)
    told = world.host.sent_to("router", Happened)
    assert [each.text for each in told] == world.observer.notes
    assert RANK in told[0].text
    assert any("starts again" in each.text for each in told)
    assert world.host.receivers(Happened) == {"router"}


def test_a_failed_pair_names_its_engines() -> None:
    world = serving()
    world.say(RANK, PairFailed(local=RANK, peer=PEER, error="no route", fatal=False))
    (happened,) = world.host.sent_to("router", Happened)
    assert (happened.prefill, happened.decode) == ("prefill-0", "decode-0")
    assert "no route" in happened.text


# Pairs


def test_a_decode_rank_is_connected_with_every_rank_that_it_pulls_from() -> None:
    pairs = Pairs(make_plan(tp_size=3), NativeEngine())
    engines = ("prefill-0", "decode-0")
    assert pairs.missing(engines)[0] == "decode-0/rank-0 has no path to prefill-0"
    for decode in ("decode-0/rank-1", "decode-0/rank-2"):
        pairs.add(pair_ready(decode, PEER, 0))
    pairs.add(pair_ready(RANK, PEER, 0, num_peers=3))
    pairs.fail(RANK, "prefill-0/rank-1", "the first READ failed")
    for num, said in ((1, ": the first READ failed"), (2, "")):
        expected = f"{RANK} has a path to only {num} of 3 ranks of prefill-0{said}"
        assert pairs.missing(engines) == [expected]
        pairs.add(pair_ready(RANK, f"prefill-0/rank-{num}", 0, num_peers=3))
    assert pairs.missing(engines) == []
    pairs.forget("prefill-0/rank-2")
    assert pairs.missing(engines) != []


# Many engines

MANY = 3 * MAX_PEERS


def many_engines() -> World:
    *engines, router = make_plan(num_prefill=MANY, num_decode=MANY).processes
    world = World(Plan(processes=(*with_peers(engines), router))).start()
    for name in world.host.running:
        world.supervisor.handle(MessageReceived(name, Register(name=name, incarnation=1)))
        world.supervisor.handle(MessageReceived(name, Ready()))
    world.pass_time(0.0)
    return world


def connect_due_pairs(world: World) -> None:
    for decode in world.ranks("decode"):
        for engine in decode.peers or ():
            pair = pair_ready(decode.name, f"{engine}/rank-0", 1)
            world.supervisor.handle(MessageReceived(decode.name, pair))
    world.pass_time(0.0)


def peers_of(world: World, engine: str) -> set[str]:
    entries = world.host.registry(f"{engine}/rank-0").entries
    return {entry.engine for entry in entries} - {engine, ""}


def test_many_engines_are_told_of_their_peers_and_ready_with_the_pairs_among_them() -> None:
    world = many_engines()
    assert world.observer.ready_count == 0
    connect_due_pairs(world)
    assert world.observer.ready_count == 1
    for engine in world.plan.engines("decode"):
        told = peers_of(world, engine)
        assert MAX_PEERS <= len(told) < MANY
        assert all(name.startswith("prefill") for name in told)
    # Only routers see all.
    assert len(world.host.registry("router").entries) == len(world.plan.processes)


def test_a_change_is_told_to_the_peers_and_the_router_alone() -> None:
    world = many_engines()
    connect_due_pairs(world)
    peers = peers_of(world, "prefill-3")
    world.host.sent.clear()
    world.exit("prefill-3/rank-0", 1)
    told = {name.partition("/")[0] for name in world.host.receivers(Registry)}
    assert told == peers | {"prefill-3", "router"}
    seen = world.host.registry(f"{min(peers)}/rank-0").entries
    assert "prefill-3/rank-0" not in {entry.name for entry in seen}
