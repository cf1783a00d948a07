"""An engine that dies again and again, while others of its role serve."""

from __future__ import annotations

import signal

import pytest

from pdlaunch.supervisor.states import Phase
from tests.supervisor.fakes import World, make_plan


def crash_loop(world: World, name: str, *, times: int = 5) -> None:
    for number in range(times):
        world.fail(name, "disk full")
        world.exit(name, 1)
        if number < times - 1:
            world.pass_time(10)
            world.become_ready(name)


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-0"])
def test_it_is_given_up_with_all_of_its_processes_and_the_others_serve_on(name: str) -> None:
    world = World(make_plan(num_decode=2)).start().all_ready()
    other = "decode-0/rank-0" if name == "decode-0" else "decode-0"
    crash_loop(world, name)
    assert world.signalled(signal.SIGKILL) == {other}
    world.exit(other, -9)
    world.pass_time(1000)
    assert (world.state(name), world.state(other)) == ("given-up", "given-up")
    assert not {name, other} & world.host.running.keys()
    assert world.supervisor.failure is None
    assert world.supervisor.phase is Phase.READY
    assert any(note.endswith("decode-0 is given up, decode-1 serves on") for note in world.observer.notes)


def test_the_registry_lists_its_server_as_failed_and_nothing_else_of_it() -> None:
    world = World(make_plan(num_decode=2, tp_size=2)).start().all_ready()
    for number in range(5):
        world.exit("decode-0/rank-1", 1)
        world.exit("decode-0/rank-0", -9)
        if number < 4:
            world.pass_time(10)
            world.become_ready("decode-0/rank-0")
            world.become_ready("decode-0/rank-1")
    world.exit("decode-0", -9)
    entries = {entry.name: entry for entry in world.host.registry("router").entries if entry.engine == "decode-0"}
    assert entries.keys() == {"decode-0"}
    assert (entries["decode-0"].state, entries["decode-0"].address.http, entries["decode-0"].role) == ("failed", "", "decode")


def test_no_pair_of_it_is_missed() -> None:
    world = World(make_plan(num_prefill=2, num_decode=2)).start().all_ready()
    for name in ("decode-0", "prefill-0"):
        crash_loop(world, name)
        world.exit(f"{name}/rank-0", -9)
    assert world.supervisor.status().num_missing_pairs == 0


def test_the_launch_ends_with_the_last_engine_of_a_role_and_tells_of_the_others() -> None:
    world = World(make_plan(num_decode=2)).start().all_ready()
    crash_loop(world, "decode-0")
    world.exit("decode-0/rank-0", -9)
    crash_loop(world, "decode-1")
    failure = world.supervisor.failure
    assert failure is not None
    assert (failure.process, failure.said) == ("decode-1", "disk full")
    assert failure.summary == "decode-1 died 5 times in a row, each within 60 s of its start"
    assert list(failure.details) == ["  before that, decode-0 died 5 times in a row, each within 60 s of its start: disk full"]


def test_a_router_that_always_dies_ends_the_launch() -> None:
    world = World(make_plan(num_decode=2)).start().all_ready()
    crash_loop(world, "router")
    assert world.supervisor.failure is not None
    assert world.supervisor.failure.process == "router"


def test_a_launch_with_an_engine_given_up_stops_like_any_other() -> None:
    world = World(make_plan(num_decode=2)).start().all_ready()
    crash_loop(world, "decode-0")
    world.exit("decode-0/rank-0", -9)
    world.interrupt()
    world.interrupt()
    world.exit_all()
    assert world.supervisor.done
    assert world.supervisor.failure is None
    assert world.state("decode-0") == "given-up"
