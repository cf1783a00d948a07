"""What happens to hosts and engines is told to everybody whom it concerns."""

from __future__ import annotations

import signal

from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import Happened, PairFailed, SleepState
from tests.launch.fakes import World, make_plan, serving


def told(world: World) -> list[Happened]:
    return [each for each in world.host.sent_to("router", Happened) if isinstance(each, Happened)]


def test_the_router_hears_of_a_death_and_the_restart() -> None:
    world = serving()
    world.exit("decode-0/rank-0", -signal.SIGKILL)
    assert [each.text for each in told(world)] == world.observer.notes
    assert "decode-0/rank-0" in told(world)[0].text
    assert any("starts again" in each.text for each in told(world))
    assert not [name for name, message in world.host.sent if isinstance(message, Happened)][
        len(told(world)) :
    ], "nobody else is told"


def test_a_failed_pair_names_its_engines() -> None:
    world = serving()
    failed = PairFailed(
        local="decode-0/rank-0", peer="prefill-0/rank-0", error="no route", fatal=False
    )
    world.say("decode-0/rank-0", failed)
    (happened,) = told(world)
    assert (happened.prefill, happened.decode) == ("prefill-0", "decode-0")
    assert "no route" in happened.text


def test_the_next_router_hears_what_happened_before_it_and_how_long_ago() -> None:
    world = serving()
    world.exit("router", -signal.SIGKILL)
    world.host.sent.clear()
    world.pass_time_alive(30)
    world.register("router")
    notes = told(world)
    assert [each.text for each in notes] == world.observer.notes[: len(notes)]
    assert "router" in notes[0].text
    assert notes[0].ago_s > 0


def states(world: World) -> dict[str, str]:
    return {entry.name: entry.state for entry in world.host.registry("router").entries}


def test_everyone_hears_of_sleep_and_the_launch_goes_on() -> None:
    world = World(make_plan()).start()
    world.all_ready()
    version = world.host.registry("router").version
    world.say("prefill-0", SleepState(state="draining"))
    assert states(world)["prefill-0"] == "draining"
    world.say("prefill-0/rank-0", SleepState(state="sleeping"))
    world.say("prefill-0", SleepState(state="sleeping"))
    assert {name for name, state in states(world).items() if state == "sleeping"} == {
        "prefill-0",
        "prefill-0/rank-0",
    }
    assert world.phase is LaunchPhase.READY
    world.say("prefill-0/rank-0", SleepState(state="awake"))
    world.say("prefill-0", SleepState(state="awake"))
    assert set(states(world).values()) == {"ready"}
    assert world.host.registry("router").version == version + 5


ENGINE = ("decode-0", "decode-0/rank-0")


def test_processes_of_a_lost_host_start_again_once_there_is_room() -> None:
    world = serving()
    world.room.has_room = False
    for name in ENGINE:
        world.lose(name)
    world.pass_time_alive(600)
    assert world.listed("decode-0") is None, "nobody is sent there any more"
    assert {world.state(name) for name in ENGINE} == {"backing-off"}
    assert world.phase is LaunchPhase.READY
    world.room.has_room = True
    world.pass_time_alive(2)
    assert {world.host.running[name] for name in ENGINE} == {2}
    assert any("was lost with its host node-1 (silent)" in note for note in world.observer.notes)


def test_hosts_that_are_lost_often_do_not_give_engines_up() -> None:
    world = serving()
    for _ in range(8):
        for name in ENGINE:
            world.lose(name)
        world.pass_time_alive(2)
        for name in ENGINE:
            world.become_ready(name)
    assert world.failure is None
    assert {world.state(name) for name in ENGINE} == {"ready"}


def test_before_the_launch_is_ready_a_lost_host_ends_it() -> None:
    world = World(make_plan()).start()
    world.lose("decode-0")
    failure = world.failure
    assert failure is not None
    assert "decode-0 was lost with its host node-1 (silent) before it was ready" in failure.summary
