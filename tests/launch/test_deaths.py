"""Processes that die or hang are started again, or given up."""

from __future__ import annotations

import signal

import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import (
    Alive,
    PairFailed,
    Progress,
    Registry,
    Restart,
    SleepState,
    Suspects,
    ToSupervisor,
)
from pdlaunch.protocol.process.step_record import LastStep
from tests.launch.fakes import World, pair_ready, serving


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


STEP = LastStep(frozenset({7, 5}), frozenset({5}))


def ready_world(tp_size: int = 1) -> World:
    world = serving(tp_size=tp_size)
    world.host.last_steps = {"decode-0": STEP}
    world.host.sent.clear()
    return world


def told(world: World) -> list[object]:
    return world.host.sent_to("router", Suspects)


@pytest.mark.parametrize(
    "code", [0, 1, 139, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE]
)
def test_router_hears_of_the_last_step_of_a_rank_that_died_by_itself_before_it_loses_the_engine(
    code: int,
) -> None:
    world = ready_world()
    world.exit("decode-0/rank-0", code)
    assert told(world) == [Suspects(origins=[5, 7], repeated=[5])]
    kinds = [type(message) for name, message in world.host.sent if name == "router"]
    assert kinds.index(Suspects) < kinds.index(Registry)
    assert {name for name, message in world.host.sent if isinstance(message, Suspects)} == {
        "router"
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_death_from_outside_makes_no_suspects(number: int) -> None:
    world = ready_world()
    world.exit("decode-0/rank-0", -number)
    assert told(world) == []


def test_server_and_router_make_no_suspects() -> None:
    world = ready_world()
    world.exit("decode-0", 1)
    world.exit("router", 1)
    assert told(world) == []


def test_other_ranks_die_with_the_first_and_make_no_suspects_again() -> None:
    world = ready_world(tp_size=3)
    world.exit("decode-0/rank-1", -signal.SIGSEGV)
    world.exit("decode-0/rank-0", 1)
    world.exit("decode-0/rank-2", -signal.SIGKILL)
    assert len(told(world)) == 1


def test_rank_that_dies_while_it_starts_again_has_computed_nothing() -> None:
    world = ready_world()
    world.exit("decode-0/rank-0", 1)
    world.pass_time(1)
    world.exit("decode-0/rank-0", 1)
    assert len(told(world)) == 1


def test_rank_that_dies_while_its_engine_is_drained_for_a_restart_makes_suspects_once() -> None:
    world = ready_world(tp_size=2)
    world.say("router", Restart(question=1, name="decode-0"))
    world.exit("decode-0/rank-1", -signal.SIGSEGV)
    world.exit("decode-0/rank-0", 1)
    assert told(world) == [Suspects(origins=[5, 7], repeated=[5])]
    assert any("decode-0/rank-1 was killed by SIGSEGV" in note for note in world.observer.notes)


def test_rank_that_was_told_to_end_makes_no_suspects() -> None:
    world = ready_world()
    world.say("router", Restart(question=1, name="decode-0"))
    world.pass_time(60)
    world.exit("decode-0/rank-0", 1)
    assert told(world) == []
