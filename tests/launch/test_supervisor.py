"""The supervisor's decisions are replayed from event histories."""

from __future__ import annotations

import signal

from pdlaunch.errors import ConfigError
from pdlaunch.launch.events import StopRequested
from pdlaunch.launch.hosts.host import ProcessExited
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import (
    Drain,
    PairFailed,
    PairSuspect,
    Progress,
    Ready,
    Register,
    Stop,
)
from tests.launch.fakes import World, make_plan, pair_ready, serving

EVERYONE = {"prefill-0/rank-0", "prefill-0", "decode-0/rank-0", "decode-0", "router"}


def test_everything_starts_at_once_and_serves_when_all_are_ready_and_connected() -> None:
    world = World(make_plan()).start()
    assert set(world.host.running) == EVERYONE
    for name in EVERYONE:
        world.become_ready(name)
    assert world.phase is LaunchPhase.STARTING
    world.connect("decode-0/rank-0", "prefill-0/rank-0")
    assert world.phase is LaunchPhase.READY
    assert world.observer.ready_count == 1


def test_conversions_run_before_anything_else() -> None:
    world = World(make_plan(conversions=2)).start()
    assert set(world.host.running) == {"convert-0", "convert-1"}
    world.say("convert-0", Progress(text="reading weights", fraction=0.4))
    assert world.supervisor.seen.status().processes[0].fraction == 0.4
    world.exit("convert-0")
    assert set(world.host.running) == {"convert-1"}
    world.exit("convert-1")
    assert set(world.host.running) == EVERYONE


def test_a_failed_conversion_is_the_root_cause() -> None:
    world = World(make_plan(conversions=1)).start()
    world.exit("convert-0", 1)
    assert world.supervisor.done
    assert world.failure is not None
    assert world.failure.process == "convert-0"


def test_a_model_that_cannot_be_served_fails_the_launch_with_its_cause() -> None:
    world = World(make_plan(conversions=1))
    world.bootstraps.prepare_error = ConfigError("no such thing")
    world.start()
    world.exit("convert-0")
    assert world.supervisor.done
    assert world.failure is not None
    assert world.failure.cause is world.bootstraps.prepare_error


def test_the_earliest_failure_is_kept_and_everything_is_stopped() -> None:
    world = World(make_plan()).start()
    world.become_ready("router")
    world.exit("decode-0/rank-0", -11)
    world.fail("decode-0", "my rank is gone")
    assert world.failure is not None
    assert world.failure.process == "decode-0/rank-0"
    assert "SIGSEGV" in world.failure.summary
    assert world.stopped() == {"router"}
    world.exit("router")
    assert world.signalled(signal.SIGTERM) == {"prefill-0/rank-0", "prefill-0", "decode-0"}
    world.exit_all()
    assert world.supervisor.done


def test_last_words_may_arrive_after_the_death() -> None:
    world = World(make_plan()).start()
    world.exit("decode-0/rank-0", 1)
    world.fail("decode-0/rank-0", "cannot open model.safetensors")
    assert world.failure is not None
    assert world.failure.said == "cannot open model.safetensors"


def test_incompatible_engines_fail_the_start_and_unreachable_ones_do_not() -> None:
    world = World(make_plan()).start()
    world.register("decode-0/rank-0")
    pair = PairFailed(
        local="decode-0/rank-0", peer="prefill-0/rank-0", error="connection refused", fatal=False
    )
    world.say("decode-0/rank-0", pair)
    assert world.failure is None
    pair.fatal, pair.error = True, "block_size 16 and 32"
    world.say("decode-0/rank-0", pair)
    assert world.failure is not None
    assert world.failure.said == "block_size 16 and 32"


def test_a_pair_in_doubt_is_not_listed_until_it_is_proven_again() -> None:
    world = serving()
    (pair,) = world.supervisor.seen.status().pairs
    doubt = PairSuspect(
        local=pair.local, peer=pair.peer, peer_incarnation=pair.peer_incarnation + 1, error="old"
    )
    world.say("router", doubt)
    assert world.supervisor.seen.status().pairs == (pair,)
    doubt.peer_incarnation -= 1
    world.say("router", doubt)
    assert world.supervisor.seen.status().pairs == ()
    assert world.phase is LaunchPhase.READY
    world.say(pair.local, pair)
    assert world.supervisor.seen.status().pairs == (pair,)


def test_the_startup_timeout_names_what_is_not_ready() -> None:
    world = World(make_plan(), Timing(startup_timeout_s=60)).start()
    for name in EVERYONE - {"decode-0/rank-0"}:
        world.become_ready(name)
    world.say("decode-0/rank-0", Progress(text="loading weights"))
    world.pass_time(59)
    assert world.failure is None
    world.pass_time(1)
    assert world.failure is not None
    assert list(world.failure.details) == ["  decode-0/rank-0 is starting: loading weights"]


def test_the_startup_timeout_names_pairs_that_are_not_connected() -> None:
    world = World(make_plan(), Timing(startup_timeout_s=60)).start()
    for name in EVERYONE:
        world.become_ready(name)
    pair = PairFailed(
        local="decode-0/rank-0", peer="prefill-0/rank-0", error="connection refused", fatal=False
    )
    world.say("decode-0/rank-0", pair)
    world.pass_time(60)
    assert world.failure is not None
    assert list(world.failure.details) == [
        "  decode-0/rank-0 has no path to prefill-0: connection refused"
    ]


def test_the_registry_goes_to_all_on_every_change_with_a_growing_version() -> None:
    world = World(make_plan()).start()
    world.register("router")
    world.register("prefill-0")
    versions = [world.host.registry(name).version for name in ("router", "prefill-0")]
    assert versions == [2, 2]
    world.say("prefill-0", Ready())
    registry = world.host.registry("router")
    assert registry.version == 3
    assert [(entry.name, entry.state) for entry in registry.entries] == [
        ("prefill-0", "ready"),
        ("router", "starting"),
    ]


def test_a_stranger_an_old_incarnation_and_an_unregistered_process_are_not_believed() -> None:
    world = World(make_plan()).start()
    world.say("prefill-9", Ready())
    world.say("prefill-0", Ready())
    world.say("prefill-0", Register(name="prefill-0", incarnation=7, pid=1))
    world.say("prefill-0", Register(name="decode-0", incarnation=1, pid=1))
    assert world.supervisor.seen.status().processes[1].state == "starting"
    assert not world.host.sent


def test_a_dead_server_alone_is_restarted_under_a_new_incarnation() -> None:
    world = serving()
    world.exit("decode-0", -9)
    assert "decode-0" not in [entry.name for entry in world.host.registry("router").entries]
    assert world.state("decode-0") == "backing-off"
    world.pass_time(0.4)
    assert "decode-0" not in world.host.running
    world.pass_time(0.2)
    assert world.host.running["decode-0"] == 2
    world.become_ready("decode-0")
    assert [
        e.incarnation for e in world.host.registry("router").entries if e.name == "decode-0"
    ] == [2]
    assert world.host.spawned.count(("decode-0/rank-0", 1)) == 1


def test_the_ranks_of_an_engine_die_and_return_together() -> None:
    world = serving(tp_size=3)
    world.exit("decode-0/rank-1", 1)
    assert world.signalled(signal.SIGKILL) == {"decode-0/rank-0", "decode-0/rank-2"}
    assert not [
        entry
        for entry in world.host.registry("router").entries
        if entry.name.startswith("decode-0/")
    ]
    world.pass_time(10)
    assert "decode-0/rank-1" not in world.host.running
    world.exit("decode-0/rank-0", -9)
    world.exit("decode-0/rank-2", -9)
    world.pass_time(0.6)
    assert {name: n for name, n in world.host.running.items() if n == 2} == {
        f"decode-0/rank-{n}": 2 for n in range(3)
    }
    assert world.phase is LaunchPhase.READY


def test_pairs_of_a_dead_process_are_forgotten_and_old_incarnations_do_not_count() -> None:
    world = serving()
    world.exit("prefill-0/rank-0", -9)
    assert world.supervisor.seen.status().num_missing_pairs == 1
    world.pass_time(1)
    world.become_ready("prefill-0/rank-0")
    world.say("decode-0/rank-0", pair_ready("decode-0/rank-0", "prefill-0/rank-0", 1))
    assert world.supervisor.seen.status().num_missing_pairs == 1
    world.say("decode-0/rank-0", pair_ready("decode-0/rank-0", "prefill-0/rank-0", 2))
    assert world.supervisor.seen.status().num_missing_pairs == 0


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
    assert world.failure is not None
    assert world.failure.process == "decode-0"
    assert world.failure.said == "disk full"
    assert world.stopped()


def test_a_restarted_process_that_never_gets_ready_is_killed() -> None:
    world = serving(Timing(startup_timeout_s=60))
    world.exit("decode-0", 1)
    world.pass_time(1)
    world.pass_time(60)
    assert world.signalled(signal.SIGKILL) == {"decode-0"}


def test_a_process_that_says_failed_but_stays_is_killed() -> None:
    world = serving()
    world.fail("decode-0/rank-0", "CUDA error")
    world.pass_time(5)
    assert world.signalled(signal.SIGKILL) == {"decode-0/rank-0"}


def test_connections_are_refused_once_the_drain_is_over() -> None:
    world = serving(Timing(drain_s=30))
    world.interrupt()
    assert world.listens
    world.drained("router")
    assert world.listens
    for name in ("prefill-0", "decode-0"):
        world.drained(name)
    assert world.stopped() == EVERYONE
    assert not world.listens


def test_the_end_of_an_old_incarnation_is_not_taken_for_the_new_one() -> None:
    world = serving()
    world.exit("decode-0", 1)
    world.pass_time(1)
    world.supervisor.handle(ProcessExited("decode-0", 1, 1))
    world.supervisor.tick()
    assert world.state("decode-0") == "starting"


def test_stop_drains_router_then_engines_then_stops_all() -> None:
    world = serving(Timing(drain_s=30))
    world.interrupt(signal.SIGTERM)
    assert world.draining() == {"router"}
    assert (
        next(e.state for e in world.host.registry("decode-0").entries if e.name == "router")
        == "draining"
    )
    world.pass_time(10)
    world.drained("router")
    assert world.draining() == {"router", "prefill-0", "decode-0"}
    assert world.host.sent_to("decode-0", Drain) == [Drain(timeout_s=20.0)]
    world.drained("prefill-0")
    assert not world.stopped()
    world.drained("decode-0")
    assert world.stopped() == EVERYONE
    world.exit_all()
    assert world.supervisor.done
    assert world.failure is None


def test_sigterm_again_skips_nothing_and_ctrl_c_then_does() -> None:
    """At a time limit Slurm sends it twice."""
    world = serving(Timing(drain_s=30))
    world.interrupt(signal.SIGTERM)
    world.interrupt(signal.SIGTERM)
    assert world.draining() == {"router"}
    assert not world.stopped()
    world.interrupt()
    assert world.stopped() == {"router"}


def test_a_second_interrupt_skips_the_drain_and_a_third_kills() -> None:
    world = serving()
    world.interrupt()
    world.interrupt()
    assert world.stopped() == {"router"}
    world.exit("router")
    assert world.stopped() == EVERYONE
    assert not world.signalled(signal.SIGTERM)
    world.interrupt()
    assert world.signalled(signal.SIGKILL) == EVERYONE - {"router"}


def test_engines_outlive_the_router_but_do_not_wait_for_it_for_long() -> None:
    world = serving(Timing(drain_s=0, router_stop_s=1.5, stop_s=5))
    world.interrupt()
    assert world.phase is LaunchPhase.STOPPING_ROUTER
    world.pass_time(1.4)
    assert world.stopped() == {"router"}
    world.pass_time(0.1)
    assert world.stopped() == EVERYONE
    assert len(world.host.sent_to("router", Stop)) == 1
    for name in EVERYONE - {"router"}:
        world.exit(name)
    world.pass_time(5)
    assert world.signalled(signal.SIGTERM) == {"router"}


def test_what_does_not_stop_is_terminated_and_then_killed_and_then_left() -> None:
    world = serving(Timing(drain_s=0, stop_s=5, terminate_s=3, kill_s=4))
    world.interrupt()
    for name in EVERYONE - {"decode-0"}:
        world.exit(name)
    world.pass_time(5)
    assert world.signalled(signal.SIGTERM) == {"decode-0"}
    world.pass_time(3)
    assert world.signalled(signal.SIGKILL) == {"decode-0"}
    assert not world.supervisor.done
    world.pass_time(4)
    assert world.supervisor.done
    assert [p.name for p in world.supervisor.seen.processes() if p.alive] == ["decode-0"]


def test_deaths_during_the_drain_restart_nothing() -> None:
    world = serving()
    world.exit("decode-0", 1)
    world.interrupt()
    world.exit("router", -9)
    world.pass_time(1)
    assert world.state("decode-0") == "exited"
    assert "decode-0" not in world.host.running
    assert world.draining() == {"router", "prefill-0"}


def test_an_interrupt_while_starting_stops_without_drain() -> None:
    world = World(make_plan()).start()
    world.interrupt()
    assert world.signalled(signal.SIGTERM) == EVERYONE
    world.exit_all()
    assert world.supervisor.done
    assert not world.supervisor.seen.was_ready


def test_an_interrupt_while_converting_starts_nothing_afterwards() -> None:
    world = World(make_plan(conversions=1)).start()
    world.interrupt()
    world.exit("convert-0")
    assert world.supervisor.done
    assert world.host.spawned == [("convert-0", 1)]


def test_a_long_life_starts_the_count_of_deaths_anew() -> None:
    world = serving()
    for _ in range(20):
        world.pass_time(61)
        world.exit("decode-0", 1)
        world.pass_time(0.5)
        world.become_ready("decode-0")
    assert world.failure is None


def test_what_ends_with_the_supervisor_at_once_is_no_death() -> None:
    """A batch system sends its signal to all processes."""
    world = serving()
    world.supervisor.handle(StopRequested(signal.SIGTERM))
    for name in list(world.host.running):
        world.exit(name, -signal.SIGTERM)
    assert world.supervisor.done
    assert len(world.observer.notes) == 1
