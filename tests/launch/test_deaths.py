"""Processes that die or hang are started again, or given up."""

import signal

import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import (
    MODEL_CHANGED,
    Alive,
    PairFailed,
    Progress,
    Ready,
    Registry,
    Restart,
    SleepState,
    Stop,
    Suspects,
    ToSupervisor,
)
from pdlaunch.protocol.process.step_record import LastStep
from tests.launch.fakes import World, pair_ready, serving

RANK = "decode-0/rank-0"
ENGINE = ("decode-0", RANK)


def crash_loop(world: World, name: str, *, times: int = 5, returncode: int = 1) -> None:
    for number in range(times):
        if returncode > 0:
            world.fail(name, "disk full")
        world.exit(name, returncode)
        if number < times - 1:
            world.pass_time(10)
            world.become_ready(name)


# Deaths


def test_the_ranks_of_an_engine_die_and_return_together() -> None:
    world = serving(tp_size=3)
    ranks = [f"decode-0/rank-{n}" for n in range(3)]
    world.exit(ranks[1], 1)
    assert world.signalled(signal.SIGKILL) == {ranks[0], ranks[2]}
    assert {world.listed(name) for name in ranks} == {None}
    world.pass_time(10)
    assert ranks[1] not in world.host.running
    world.exit(ranks[0], -9)
    world.exit(ranks[2], -9)
    world.pass_time(0.6)
    assert [world.host.running[name] for name in ranks] == [2, 2, 2]
    assert world.phase is LaunchPhase.READY


def test_pairs_of_a_dead_process_are_forgotten_and_old_incarnations_do_not_count() -> None:
    world = serving()
    world.exit("prefill-0/rank-0", -9)
    assert world.status.num_missing_pairs == 1
    world.pass_time(1)
    world.become_ready("prefill-0/rank-0")
    for incarnation, num_missing in ((1, 1), (2, 0)):
        world.say(RANK, pair_ready(RANK, "prefill-0/rank-0", incarnation))
        assert world.status.num_missing_pairs == num_missing


def test_back_off_grows_and_ends_in_a_failed_launch() -> None:
    world = serving()
    waits = []
    for _ in range(4):
        world.exit("decode-0", 1)
        waits.append(world.supervisor.next_tick_at() - world.clock())
        world.pass_time(waits[-1])
        world.become_ready("decode-0")
    assert waits == [0.5, 1, 2, 4]
    world.fail("decode-0", "disk full")
    world.exit("decode-0", 1)
    assert (world.failed.process, world.failed.said) == ("decode-0", "disk full")
    assert world.stopped()


def test_a_long_life_starts_the_count_of_deaths_anew() -> None:
    world = serving()
    for _ in range(20):
        world.pass_time(61)
        world.exit("decode-0", 1)
        world.pass_time(0.5)
        world.become_ready("decode-0")
    assert world.failure is None


def test_a_process_that_stays_unready_or_says_failed_and_stays_is_killed() -> None:
    world = serving(Timing(startup_timeout_s=60))
    world.exit("decode-0", 1)
    world.pass_time(1)
    world.pass_time(60)
    assert world.signalled(signal.SIGKILL) == {"decode-0"}
    world.fail(RANK, "CUDA error")
    world.pass_time(5)
    assert world.signalled(signal.SIGKILL) == {"decode-0", RANK}


def test_a_process_that_comes_back_with_another_model_is_stopped_as_one_that_failed() -> None:
    """It would give other tokens than its peers."""
    world = serving()
    world.exit("decode-0", 1)
    world.pass_time(1)
    world.register("decode-0")
    world.say("decode-0", Ready(model={"model.safetensors": "another digest"}))
    assert world.host.sent_to("decode-0", Stop)

    def shown() -> tuple[str, str, bool]:
        entry = world.entries()["decode-0"]
        return entry.state, entry.address.http, MODEL_CHANGED in entry.reason

    assert shown() == ("starting", "", True)
    world.exit("decode-0")
    assert shown() == ("failed", "", True)
    world.pass_time(1)
    world.become_ready("decode-0")
    assert shown()[::2] == ("ready", False)


def test_processes_of_a_lost_host_start_again_once_there_is_room() -> None:
    world = serving()
    world.room.has_room = False
    world.lose(*ENGINE)
    world.pass_time_alive(600)
    assert world.listed("decode-0") is None, "nobody is sent there any more"
    assert {world.state(name) for name in ENGINE} == {"backing-off"}
    assert world.phase is LaunchPhase.READY
    world.room.has_room = True
    world.pass_time_alive(2)
    assert {world.host.running[name] for name in ENGINE} == {2}
    assert any("was lost with its host node-1 (silent)" in note for note in world.observer.notes)
    world.become_ready(*ENGINE)
    for _ in range(8):  # It does not give an engine up that its host is lost often.
        world.lose(*ENGINE)
        world.pass_time_alive(2)
        world.become_ready(*ENGINE)
    assert {world.state(name) for name in ENGINE} == {"ready"}


def test_an_engine_that_loses_one_of_its_hosts_is_not_given_up() -> None:
    """Its rank on the other host dies before the supervisor notices the loss."""
    world = serving(tp_size=2)
    ranks = [RANK, "decode-0/rank-1"]
    for _ in range(8):
        world.exit(RANK, 1)
        world.pass_time_alive(9)
        world.lose("decode-0/rank-1")
        world.pass_time_alive(2)
        world.become_ready(*ranks)
    assert {world.state(name) for name in ranks} == {"ready"}


# Engines that are given up


@pytest.mark.parametrize(
    ("name", "returncode"), [("decode-0", 1), (RANK, 1), (RANK, -signal.SIGKILL)]
)
def test_it_is_given_up_and_the_others_serve_on(name: str, returncode: int) -> None:
    """SIGKILL counts: the kernel sends it for lack of memory."""
    world = serving(num_decode=2)
    crash_loop(world, name, returncode=returncode)
    world.pass_time(7)
    assert world.state(name) == "given-up"
    assert name not in world.host.running
    assert world.failure is None
    note = "decode-0 is given up and tried again in 8 s; still serving: decode-1"
    assert world.observer.notes[-1].endswith(note)
    entry = world.entries()["decode-0"]
    assert (entry.state, entry.address.http, entry.role) == ("failed", "", "decode")
    assert "died 5 times in a row" in entry.reason
    assert entry.reason.endswith("; tried again 8 s later")


def test_engines_of_both_roles_serve_on_without_a_pair_and_the_pair_without_them() -> None:
    for lost, left in (("decode-0", "both-0"), ("both-0", "prefill-0, decode-0")):
        world = serving(num_both=1)
        crash_loop(world, lost)
        assert world.failure is None
        assert any(f"in 8 s; still serving: {left}" in note for note in world.observer.notes)
    crash_loop(world, "decode-0")
    assert world.failure is not None, "a prefill engine alone is no pair"


def test_each_time_it_is_left_alone_for_twice_as_long_up_to_a_limit() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "decode-0")
    for wait_s in (8, 16, 32, 64, 128, 256, 512, 900, 900):
        world.pass_time_alive(wait_s - 1, step_s=10)
        assert world.state("decode-0") == "given-up"
        world.pass_time_alive(1)
        assert world.state("decode-0") == "starting"
        world.exit("decode-0", 1)
    assert world.failure is None


def test_a_router_that_always_dies_or_an_engine_on_trial_does_not_hold_a_launch() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "router")
    assert world.failed.process == "router"
    world = serving(num_decode=2)
    crash_loop(world, "decode-0")
    world.pass_time(8)
    crash_loop(world, "decode-1")
    assert world.failure is not None


# Hangs


def watched(timeout_s: float = 60.0, **shape: int) -> World:
    return serving(Timing(hang_timeout_s=timeout_s), **shape)


@pytest.mark.parametrize("name", [RANK, "decode-0", "router"])
def test_what_says_nothing_for_too_long_is_killed_and_restarted(name: str) -> None:
    world = watched()
    world.pass_time_alive(29, silent=[name])
    assert world.listed(name) == "ready"
    world.pass_time_alive(30, silent=[name])
    assert world.listed(name) == "stalled", "it gets no new work"
    assert not world.signalled(signal.SIGKILL)
    world.pass_time_alive(12, silent=[name])
    assert name == "router" or world.listed(name) is None
    assert world.signalled(signal.SIGKILL) == {name}
    assert any(f"{name} hung: its main loop stood" in note for note in world.observer.notes)
    world.pass_time_alive(10, silent=[name])
    assert world.host.spawned.count((name, 2)) == 0, "a successor while it is still there"
    world.exit(name, -9)
    world.pass_time_alive(1)
    assert world.host.running[name] == 2
    world.become_ready(name)
    assert world.failure is None
    ends = dict(world.host.registry("router").ends)
    assert ends.pop(name) == {"died": 0, "hung": 1}
    assert all(counts == {"died": 0, "hung": 0} for counts in ends.values())


def test_all_ranks_go_with_the_one_that_hangs_and_it_is_the_cause() -> None:
    world = watched(tp_size=3)
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
        (pair_ready(RANK, "prefill-0/rank-0", 1), False),
        (PairFailed(local=RANK, peer="prefill-0/rank-0", error="refused", fatal=False), False),
    ],
)
def test_progress_counts_and_what_other_threads_say_does_not(
    message: ToSupervisor, counts: bool
) -> None:
    world = watched()
    for _ in range(10):
        world.pass_time_alive(10, silent=[RANK])
        world.say(RANK, message)
    assert world.signalled(signal.SIGKILL) == (set() if counts else {RANK})


def test_one_that_sleeps_may_load_its_weights_for_as_long_as_a_start_takes() -> None:
    world = watched()
    world.say(RANK, SleepState(state="sleeping"))
    world.pass_time_alive(590, silent=[RANK])
    assert not world.signalled(signal.SIGKILL)
    world.pass_time_alive(30, silent=[RANK])
    assert world.signalled(signal.SIGKILL) == {RANK}


def test_a_supervisor_that_was_stopped_itself_blames_nobody() -> None:
    world = watched()
    world.pass_time(3600)
    assert not world.signalled(signal.SIGKILL)
    assert world.listed(RANK) == "ready"
    world.pass_time_alive(80, silent=[RANK])
    assert world.signalled(signal.SIGKILL) == {RANK}


def test_nobody_is_watched_when_that_is_off_or_the_launch_ends() -> None:
    off = watched(0.0)
    off.pass_time_alive(3600, silent=[RANK], step_s=60)
    assert not off.signalled(signal.SIGKILL)
    leaving = watched(5.0)
    leaving.interrupt()
    leaving.pass_time_alive(20, silent=[RANK])
    assert not leaving.signalled(signal.SIGKILL)


def test_heartbeats_alone_send_no_registry_and_change_no_view() -> None:
    world = watched(6.0)
    assert world.supervisor.next_tick_at() == world.clock.now + 1.0
    sent, shown = len(world.host.sent), len(world.observer.statuses)
    world.say(RANK, Alive())
    assert (len(world.host.sent), len(world.observer.statuses)) == (sent, shown)


# Requests that may be to blame


def with_step(tp_size: int = 1) -> World:
    world = serving(tp_size=tp_size)
    world.last_step = LastStep(frozenset({7, 5}), frozenset({5}))
    return world


@pytest.mark.parametrize("code", [0, 1, 139, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS])
def test_router_hears_of_the_last_step_of_a_rank_that_died_by_itself_before_it_loses_the_engine(
    code: int,
) -> None:
    world = with_step()
    world.host.sent.clear()
    world.exit(RANK, code)
    assert world.host.sent_to("router", Suspects) == [Suspects(origins=[5, 7], repeated=[5])]
    kinds = [type(message) for name, message in world.host.sent if name == "router"]
    assert kinds.index(Suspects) < kinds.index(Registry)
    assert world.host.receivers(Suspects) == {"router"}
    world.pass_time(1)
    world.exit(RANK, code)
    assert len(world.host.sent_to("router", Suspects)) == 1, "it had computed nothing yet"


@pytest.mark.parametrize("name", ["decode-0", "router", RANK])
def test_other_processes_and_deaths_from_outside_make_no_suspects(name: str) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        world = with_step()
        world.exit(name, -number if name == RANK else 1)
        assert not world.host.receivers(Suspects)


@pytest.mark.parametrize("is_restarted", [True, False])
def test_other_ranks_die_with_the_first_and_make_no_suspects_again(is_restarted: bool) -> None:
    world = with_step(tp_size=3)
    if is_restarted:
        world.ask(Restart(question=1, name="decode-0"))
    world.exit("decode-0/rank-1", -signal.SIGSEGV)
    world.exit("decode-0/rank-0", 1)
    world.exit("decode-0/rank-2", -signal.SIGKILL)
    assert len(world.host.sent_to("router", Suspects)) == 1
    assert any("decode-0/rank-1 was killed by SIGSEGV" in note for note in world.observer.notes)


def test_rank_that_was_told_to_end_makes_no_suspects() -> None:
    world = with_step()
    world.ask(Restart(question=1, name="decode-0"))
    world.pass_time(60)
    world.exit(RANK, 1)
    assert not world.host.receivers(Suspects)
