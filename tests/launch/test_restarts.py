"""An engine that dies again and again while others of its role serve is given up, and tried again
more and more slowly.
"""

from __future__ import annotations

import signal

import pytest

from pdlaunch.launch.status import LaunchPhase
from tests.launch.fakes import World, serving


def crash_loop(world: World, name: str, *, times: int = 5, returncode: int = 1) -> None:
    for number in range(times):
        if returncode > 0:
            world.fail(name, "disk full")
        world.exit(name, returncode)
        if number < times - 1:
            world.pass_time(10)
            world.become_ready(name)


def give_up(world: World, name: str = "decode-0") -> None:
    """Let all processes of an engine die too often."""
    crash_loop(world, name)
    world.exit(f"{name}/rank-0", -9)


def become_ready(world: World, engine: str) -> None:
    world.become_ready(engine)
    world.become_ready(f"{engine}/rank-0")


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-0"])
def test_it_is_given_up_with_all_of_its_processes_and_the_others_serve_on(name: str) -> None:
    world = serving(num_decode=2)
    other = "decode-0/rank-0" if name == "decode-0" else "decode-0"
    crash_loop(world, name)
    assert world.signalled(signal.SIGKILL) == {other}
    world.exit(other, -9)
    world.pass_time(59)
    assert (world.state(name), world.state(other)) == ("given-up", "given-up")
    assert not {name, other} & world.host.running.keys()
    assert world.failure is None
    assert world.phase is LaunchPhase.READY
    assert any(
        note.endswith("decode-0 is given up and tried again in 60 s, decode-1 serves on")
        for note in world.observer.notes
    )


def test_the_registry_lists_its_server_as_failed_and_nothing_else_of_it() -> None:
    world = serving(num_decode=2, tp_size=2)
    for number in range(5):
        world.exit("decode-0/rank-1", 1)
        world.exit("decode-0/rank-0", -9)
        if number < 4:
            world.pass_time(10)
            world.become_ready("decode-0/rank-0")
            world.become_ready("decode-0/rank-1")
    world.exit("decode-0", -9)
    entries = {
        entry.name: entry
        for entry in world.host.registry("router").entries
        if entry.engine == "decode-0"
    }
    assert entries.keys() == {"decode-0"}
    assert (
        entries["decode-0"].state,
        entries["decode-0"].address.http,
        entries["decode-0"].role,
    ) == ("failed", "", "decode")
    assert entries["decode-0"].reason == (
        "decode-0/ranks died 5 times in a row, each within 60 s of its start: ended with exit code "
        "1; tried again 60 s later"
    )


def test_the_launch_ends_with_the_last_engine_of_a_role_and_tells_of_the_others() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "decode-0")
    world.exit("decode-0/rank-0", -9)
    crash_loop(world, "decode-1")
    failure = world.failure
    assert failure is not None
    assert (failure.process, failure.said) == ("decode-1", "disk full")
    assert failure.summary == "decode-1 died 5 times in a row, each within 60 s of its start"
    assert list(failure.details) == [
        "  before that, decode-0 died 5 times in a row, each within 60 s of its start: disk full"
    ]


def test_engines_of_both_roles_serve_on_without_a_pair_and_the_pair_without_them() -> None:
    for lost, left in (("decode-0", "both-0"), ("both-0", "prefill-0, decode-0")):
        world = serving(num_both=1)
        crash_loop(world, lost)
        world.exit(f"{lost}/rank-0", -9)
        assert world.failure is None
        assert world.observer.notes[-1].endswith(f"tried again in 60 s, {left} serves on")
    crash_loop(world, "decode-0")
    failure = world.failure
    assert failure is not None, "a prefill engine alone is no pair"
    assert list(failure.details) == [
        "  before that, both-0 died 5 times in a row, each within 60 s of its start: disk full"
    ]


def test_it_is_tried_again_and_serves_as_if_nothing_had_been() -> None:
    world = serving(num_decode=2)
    give_up(world)
    world.pass_time(60)
    assert (world.state("decode-0"), world.state("decode-0/rank-0")) == ("starting", "starting")
    assert world.listed("decode-0") is None
    become_ready(world, "decode-0")
    assert world.listed("decode-0") == "ready"
    world.connect("decode-0/rank-0", "prefill-0/rank-0")
    assert world.supervisor.seen.status().num_missing_pairs == 0
    world.pass_time_alive(61)
    world.exit("decode-0", 1)
    world.pass_time(0.5)
    assert world.state("decode-0") == "starting"
    assert (
        next(
            entry.reason
            for entry in world.host.registry("router").entries
            if entry.name == "decode-1"
        )
        == ""
    )


def test_each_time_it_is_left_alone_for_twice_as_long_up_to_a_limit() -> None:
    world = serving(num_decode=2)
    give_up(world)
    for wait_s in (60, 120, 240, 480, 900, 900):
        world.pass_time_alive(wait_s - 1)
        assert world.state("decode-0") == "given-up"
        world.pass_time_alive(1)
        assert world.state("decode-0") == "starting"
        world.exit("decode-0", 1)
        world.exit("decode-0/rank-0", -9)
    assert world.failure is None


def test_it_is_not_tried_again_before_all_of_it_is_dead() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "decode-0")
    world.pass_time(100)
    assert "decode-0" not in world.host.running
    assert world.supervisor.next_tick_at() > world.clock.now
    world.exit("decode-0/rank-0", -9)
    world.pass_time(1)
    assert world.host.running.keys() >= {"decode-0", "decode-0/rank-0"}


def test_sigkill_counts_as_the_kernel_sends_it_for_lack_of_memory() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "decode-0/rank-0", returncode=-9)
    assert world.failure is None
    assert any("decode-0 is given up" in note for note in world.observer.notes)


def test_a_router_that_always_dies_ends_the_launch() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "router")
    assert world.failure is not None
    assert world.failure.process == "router"


def test_the_waits_begin_anew_after_long_service() -> None:
    world = serving(num_decode=2)
    for _ in range(3):
        give_up(world)
        world.pass_time_alive(60)
        become_ready(world, "decode-0")
        world.pass_time_alive(61)
        world.exit("decode-0", 1)
        world.pass_time(1)
        world.become_ready("decode-0")
        world.pass_time_alive(61)


def test_an_engine_on_trial_does_not_hold_a_launch_that_has_lost_the_others() -> None:
    world = serving(num_decode=2)
    give_up(world)
    world.pass_time(60)
    crash_loop(world, "decode-1")
    assert world.failure is not None
