"""Processes that live and do nothing are noticed and killed."""

from __future__ import annotations

import signal

import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.protocol.control import Alive, PairFailed, Progress, SleepState, ToSupervisor
from tests.launch.fakes import World, pair_ready, serving

DECODE = "decode-0/rank-0"


def make_world(timeout_s: float = 60.0, **shape: int) -> World:
    return serving(Timing(hang_timeout_s=timeout_s), **shape)


@pytest.mark.parametrize("name", [DECODE, "decode-0", "router"])
def test_what_says_nothing_for_too_long_is_killed_and_restarted(name: str) -> None:
    world = make_world()
    world.pass_time_alive(59, silent=[name])
    assert not world.signalled(signal.SIGKILL)
    world.pass_time_alive(12, silent=[name])
    assert world.signalled(signal.SIGKILL) == {name}
    assert any(f"{name} hung: its loop did not turn for" in note for note in world.observer.notes)
    world.pass_time_alive(10, silent=[name])
    assert world.host.spawned.count((name, 2)) == 0, "a successor while it is still there"
    world.exit(name, -9)
    world.pass_time_alive(1)
    assert world.host.running[name] == 2
    world.become_ready(name)
    assert world.failure is None
    assert world.host.registry("router").ends[name] == {"died": 0, "hung": 1}
    others = [
        counts for other, counts in world.host.registry("router").ends.items() if other != name
    ]
    assert others == [{"died": 0, "hung": 0}] * len(others), "those that were killed with it"


def test_it_leaves_the_registry_with_the_kill_and_gets_no_work_from_half_of_its_time_on() -> None:
    world = make_world()
    world.pass_time_alive(20, silent=[DECODE])
    assert world.listed(DECODE) == "ready"
    world.pass_time_alive(25, silent=[DECODE])
    assert world.listed(DECODE) == "stalled"
    world.pass_time_alive(25, silent=[DECODE])
    assert world.listed(DECODE) is None
    assert world.listed("decode-0") == "ready"


def test_all_ranks_go_with_the_one_that_hangs_and_it_is_the_cause() -> None:
    world = make_world(tp_size=3)
    world.pass_time_alive(10, silent=["decode-0/rank-1"])
    ranks = {f"decode-0/rank-{n}" for n in range(3)}
    world.pass_time_alive(70, silent=ranks)
    assert world.signalled(signal.SIGKILL) == ranks
    assert [note.split()[0] for note in world.observer.notes] == ["decode-0/rank-1"]


@pytest.mark.parametrize(
    ("message", "counts"),
    [
        (Progress(text="compiling"), True),
        (SleepState(state="draining"), True),
        (pair_ready(DECODE, "prefill-0/rank-0", 1), False),
        (PairFailed(local=DECODE, peer="prefill-0/rank-0", error="refused", fatal=False), False),
    ],
)
def test_progress_counts_and_what_other_threads_say_does_not(
    message: ToSupervisor, counts: bool
) -> None:
    world = make_world()
    for _ in range(10):
        world.pass_time_alive(10, silent=[DECODE])
        world.say(DECODE, message)
    assert world.signalled(signal.SIGKILL) == (set() if counts else {DECODE})


def test_one_that_sleeps_may_load_its_weights_for_as_long_as_a_start_takes() -> None:
    world = make_world()
    world.say(DECODE, SleepState(state="sleeping"))
    world.pass_time_alive(590, silent=[DECODE])
    assert not world.signalled(signal.SIGKILL)
    world.pass_time_alive(30, silent=[DECODE])
    assert world.signalled(signal.SIGKILL) == {DECODE}


def test_a_supervisor_that_was_stopped_itself_blames_nobody() -> None:
    world = make_world()
    world.pass_time(3600)
    assert not world.signalled(signal.SIGKILL)
    assert world.listed(DECODE) == "ready"
    world.pass_time_alive(80, silent=[DECODE])
    assert world.signalled(signal.SIGKILL) == {DECODE}


def test_nobody_is_watched_when_that_is_off_or_the_launch_ends() -> None:
    off = make_world(0.0)
    off.pass_time_alive(3600, silent=[DECODE], step_s=60)
    assert not off.signalled(signal.SIGKILL)
    leaving = serving(Timing(hang_timeout_s=5.0))
    leaving.interrupt()
    leaving.pass_time_alive(20, silent=[DECODE])
    assert not leaving.signalled(signal.SIGKILL)


def test_an_engine_that_hangs_soon_after_each_start_is_not_started_for_ever() -> None:
    world = serving(Timing(hang_timeout_s=60.0, quick_s=60, max_quick_deaths=3))
    for _ in range(3):
        world.pass_time_alive(80, silent=[DECODE])
        world.exit(DECODE, -9)
        if world.failure is None:
            world.pass_time_alive(5)
            world.become_ready(DECODE)
    assert world.failure is not None
    assert "hung" in world.failure.said


def test_heartbeats_alone_send_no_registry_and_change_no_view() -> None:
    world = make_world()
    sent, shown = len(world.host.sent), len(world.observer.statuses)
    world.say(DECODE, Alive())
    assert (len(world.host.sent), len(world.observer.statuses)) == (sent, shown)


def test_the_watch_begins_with_the_service() -> None:
    world = make_world(6.0)
    assert world.supervisor.next_tick_at() == world.clock.now + 1.0
