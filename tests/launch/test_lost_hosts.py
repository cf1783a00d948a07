"""A lost host is no fault of its engines: they wait for room, and are not given up for it."""

from __future__ import annotations

from pdlaunch.launch.status import LaunchPhase
from tests.launch.fakes import World, make_plan

ENGINE = ("decode-0", "decode-0/rank-0")


def test_processes_of_a_lost_host_start_again_once_there_is_room() -> None:
    world = World(make_plan()).start().all_ready()
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
    world = World(make_plan()).start().all_ready()
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
