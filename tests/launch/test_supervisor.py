"""The start and the end of a launch, replayed from histories of events."""

import signal
import socket

import pytest

from pdlaunch.launch.events import EventQueue, SignalInbox, StopRequested, causes_first
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import (
    Drain,
    Failed,
    PairFailed,
    PairSuspect,
    Progress,
    Ready,
    Register,
    Stop,
)
from tests.launch.fakes import SLOW, FakeHost, World, make_plan, serving

RANKS = ("decode-0/rank-0", "prefill-0/rank-0")
EVERYONE = {*RANKS, "prefill-0", "decode-0", "router"}


# The start


def test_what_cannot_be_started_fails_the_launch() -> None:
    world = World(make_plan())
    world.host.broken = {RANKS[0]}
    world.start()
    assert world.failed.process == RANKS[0]


def test_the_earliest_failure_is_kept_and_everything_is_stopped() -> None:
    world = World(make_plan()).start()
    world.become_ready("router")
    world.exit("decode-0/rank-0", -11)
    world.fail("decode-0", "my rank is gone")
    assert world.failed.process == "decode-0/rank-0"
    assert "SIGSEGV" in world.failed.summary
    assert world.stopped() == {"router"}
    world.exit("router")
    assert world.signalled(signal.SIGTERM) == {"prefill-0/rank-0", "prefill-0", "decode-0"}
    world.exit_all()
    assert world.supervisor.done


def test_last_words_may_arrive_after_the_death() -> None:
    world = World(make_plan()).start()
    world.exit("decode-0/rank-0", 1)
    world.fail("decode-0/rank-0", "cannot open model.safetensors")
    assert world.failed.said == "cannot open model.safetensors"


def test_a_slow_pair_is_announced_each_time_that_it_is_measured_and_used() -> None:
    world = World(make_plan()).start()
    world.become_ready(*EVERYONE)
    for _ in range(2):
        world.observer.notes.clear()
        world.connect(*RANKS, speed=SLOW)
        warning = f"warning: {RANKS[1]} -> {RANKS[0]} is slow: PD504 0.05 GB/s"
        assert world.observer.notes == [warning]
    assert world.phase is LaunchPhase.READY
    assert [pair.slow for pair in world.host.registry("router").pairs] == ["PD504 0.05 GB/s"]
    world.connect(*RANKS)
    assert [pair.slow for pair in world.host.registry("router").pairs] == [""]


@pytest.mark.parametrize(
    ("unready", "detail"),
    [
        (RANKS[0], "  decode-0/rank-0 is starting: loading weights"),
        ("", "  decode-0/rank-0 has no path to prefill-0: connection refused"),
    ],
)
def test_the_startup_timeout_names_what_is_missing(unready: str, detail: str) -> None:
    world = World(make_plan(), Timing(startup_timeout_s=60)).start()
    world.become_ready(*EVERYONE - {unready})
    world.say(RANKS[0], Progress(text="loading weights"))
    refused = PairFailed(local=RANKS[0], peer=RANKS[1], error="connection refused", fatal=False)
    world.say(RANKS[0], refused)
    world.pass_time(59)
    assert world.failure is None
    world.pass_time(1)
    assert list(world.failed.details) == [detail]


def test_before_the_launch_is_ready_a_lost_host_ends_it() -> None:
    world = World(make_plan()).start()
    world.lose("decode-0")
    assert world.failed.summary == (
        "decode-0 was lost with its host node-1 (silent) before it was ready"
    )


def test_a_stranger_an_old_incarnation_and_an_unregistered_process_are_not_believed() -> None:
    world = World(make_plan()).start()
    world.say("prefill-9", Ready())
    world.say("prefill-0", Ready())
    world.say("prefill-0", Register(name="prefill-0", incarnation=7))
    world.say("prefill-0", Register(name="decode-0", incarnation=1))
    assert world.state("prefill-0") == "starting"
    assert not world.host.sent
    world = serving()
    world.exit("decode-0", 1)
    world.pass_time(0.5)
    world.supervisor.handle(ProcessExited("decode-0", 1, 1))
    assert world.state("decode-0") == "starting", "the end of the old incarnation"


def test_a_pair_in_doubt_is_not_listed_until_it_is_proven_again() -> None:
    world = serving()
    (pair,) = world.status.pairs
    doubt = PairSuspect(
        local=pair.local, peer=pair.peer, peer_incarnation=pair.peer_incarnation + 1, error="old"
    )
    world.say("router", doubt)
    assert world.status.pairs == (pair,)
    doubt.peer_incarnation -= 1
    world.say("router", doubt)
    assert world.status.pairs == ()
    assert world.phase is LaunchPhase.READY
    world.say(pair.local, pair)
    assert world.status.pairs == (pair,)


# The end


def test_stop_drains_the_router_then_stops_all() -> None:
    world = serving(Timing(drain_s=30))
    world.interrupt(signal.SIGTERM)
    assert world.host.sent_to("router", Drain) == [Drain(timeout_s=30.0)]
    assert world.listed("router") == "draining"
    world.pass_time(10)
    assert world.listens
    assert not world.stopped()
    world.drained("router")
    assert world.draining() == {"router"}, "it has waited for the answers of all engines"
    assert world.stopped() == EVERYONE
    assert not world.listens, "connections are refused once the drain is over"
    world.exit_all()
    assert world.supervisor.done
    assert world.failure is None


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_drain_skips_it_and_once_more_kills(first: signal.Signals) -> None:
    world = serving(Timing(drain_s=30))
    world.interrupt(first)
    # At a time limit Slurm sends it twice.
    world.interrupt(signal.SIGTERM)
    assert world.draining() == {"router"}
    assert not world.stopped()
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
    assert world.signalled(signal.SIGKILL) == {"router"}


def test_what_does_not_stop_is_killed_and_then_left() -> None:
    world = serving(Timing(drain_s=0, stop_s=5, kill_s=4))
    world.interrupt()
    for name in EVERYONE - {"decode-0"}:
        world.exit(name)
    world.pass_time(5)
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
    assert world.stopped() == EVERYONE - {"router", "decode-0"}


def test_an_interrupt_while_starting_stops_without_drain() -> None:
    world = World(make_plan()).start()
    world.interrupt()
    assert world.signalled(signal.SIGTERM) == EVERYONE
    world.exit_all()
    assert world.supervisor.done
    assert not world.supervisor.seen.was_ready


def test_what_ends_with_the_supervisor_at_once_is_no_death() -> None:
    """A batch system sends its signal to all processes."""
    world = serving()
    world.supervisor.handle(StopRequested(signal.SIGTERM))
    world.exit_all(-signal.SIGTERM)
    assert world.supervisor.done
    assert len(world.observer.notes) == 1


def test_a_killed_rank_comes_before_its_peers_that_abort_and_those_that_complain() -> None:
    killed = ProcessExited("prefill-0/rank-1", 1, -signal.SIGKILL)
    aborted = ProcessExited("prefill-0/rank-0", 1, -signal.SIGABRT)
    complained = MessageReceived("prefill-0", Failed(error="rank 0 is gone"))
    left = ProcessExited("prefill-0", 1, 1)
    stop = StopRequested(signal.SIGINT)
    events = causes_first([stop], [left, aborted, killed], [complained])
    assert events == [stop, killed, aborted, complained, left]


def test_what_a_host_reports_and_the_end_of_the_starter_are_events() -> None:
    ours, theirs = socket.socketpair()
    host = FakeHost()
    gone = ProcessExited("router", 1, 0)
    host.exits = lambda: [gone]
    with SignalInbox() as signals, ours:
        queue = EventQueue(host, signals, lifeline=ours.fileno())
        theirs.send(b"what is written means nothing")
        assert queue.wait(20) == [gone]
        theirs.close()
        stop, same = queue.wait(20)
        reason = "the process that started this is gone"
        assert (stop, same) == (StopRequested(signal.SIGHUP, reason), gone)
        assert queue.wait(0) == [gone]
