"""``pdlaunch restart NAME`` drains, stops and starts an engine, as the supervisor sees it."""

from __future__ import annotations

import signal

import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.protocol.control import Answered, Drain, EngineIdle, Restart
from tests.launch.fakes import World, serving
from tests.launch.test_deaths import give_up

DECODE = {"decode-0", "decode-0/rank-0", "decode-0/rank-1"}


@pytest.fixture
def world() -> World:
    return serving(Timing(drain_s=30, stop_s=5), num_decode=2, tp_size=2)


def ask(world: World, name: str) -> Answered:
    """Return what the router is answered."""
    world.say("router", Restart(question=7, name=name))
    answer = world.host.sent_to("router", Answered)[-1]
    assert isinstance(answer, Answered)
    assert answer.question == 7
    return answer


def spawned_again(world: World) -> set[str]:
    return {name for name, incarnation in world.host.spawned if incarnation == 2}


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-1"])
def test_an_engine_that_serves_finishes_what_runs_before_it_is_stopped(
    world: World, name: str
) -> None:
    assert ask(world, name) == Answered(question=7, engine="decode-0", incarnation=1)
    assert world.host.sent_to("decode-0", Drain) == [Drain(timeout_s=30)]
    assert world.draining() == {"decode-0"}
    assert world.listed("decode-0") == "draining"
    world.pass_time_alive(10)
    assert not world.stopped()
    world.drained("decode-0")
    assert world.stopped() == DECODE
    assert world.listed("decode-0") is None
    for process in ("decode-0/rank-0", "decode-0"):
        world.exit(process)
    assert not spawned_again(world)
    world.exit("decode-0/rank-1")
    assert spawned_again(world) == DECODE
    for process in DECODE:
        world.become_ready(process)
    assert world.listed("decode-0") == "ready"
    assert world.failure is None
    assert not world.host.signals
    assert world.observer.notes[0] == "decode-0 is restarted, as was asked"


def test_a_prefill_engine_waits_for_those_who_read_from_it(world: World) -> None:
    ask(world, "prefill-0")
    world.drained("prefill-0")
    assert not world.stopped()
    # A router that is new has the question too.
    world.exit("router", 1)
    world.pass_time(1)
    world.register("router")
    asked = world.host.sent_to("router", EngineIdle)
    assert asked == [EngineIdle(engine="prefill-0")] * 2
    world.say("router", EngineIdle(engine="decode-0"))
    assert not world.stopped()
    world.say("router", EngineIdle(engine="prefill-0"))
    assert world.stopped() == {"prefill-0", "prefill-0/rank-0", "prefill-0/rank-1"}


def test_no_engine_is_started_while_the_launch_ends(world: World) -> None:
    """The engine that a restart waited for is gone, so nobody reads from it any more."""
    ask(world, "prefill-0")
    world.drained("prefill-0")
    world.interrupt()
    for process in ("prefill-0", "prefill-0/rank-0", "prefill-0/rank-1"):
        world.exit(process, 1)
    world.say("router", EngineIdle(engine="prefill-0"))
    assert not spawned_again(world)


def test_what_still_runs_after_the_drain_is_not_waited_for(world: World) -> None:
    ask(world, "decode-0")
    assert world.supervisor.next_tick_at() <= world.clock.now + 30
    world.pass_time_alive(30)
    assert world.stopped() == DECODE


def test_a_death_in_the_drain_hurries_it(world: World) -> None:
    ask(world, "decode-0")
    world.exit("decode-0/rank-0", -11)
    assert world.stopped() == {"decode-0", "decode-0/rank-1"}
    world.exit("decode-0/rank-1")
    world.exit("decode-0")
    assert spawned_again(world) == DECODE


def test_an_engine_that_is_given_up_starts_at_once() -> None:
    world = serving(num_decode=2)
    give_up(world)
    assert ask(world, "decode-0").error == ""
    assert (world.state("decode-0"), world.state("decode-0/rank-0")) == ("starting", "starting")
    # All deaths before are forgotten.
    for _ in range(4):
        world.exit("decode-0", 1)
        world.pass_time(10)
        world.become_ready("decode-0")
    assert world.state("decode-0") == "ready"
    world.pass_time(1000)
    assert [name for name, _ in world.host.spawned].count("decode-0/rank-0") == 2


def test_one_that_backs_off_starts_at_once() -> None:
    world = serving()
    world.exit("decode-0/rank-0", 1)
    ask(world, "decode-0")
    assert world.stopped() == {"decode-0"}
    world.exit("decode-0")
    assert world.host.running["decode-0/rank-0"] == world.host.running["decode-0"] == 2


def test_asked_twice_it_is_restarted_once(world: World) -> None:
    ask(world, "decode-0")
    assert ask(world, "decode-0").error == ""
    assert world.host.sent_to("decode-0", Drain) == [Drain(timeout_s=30)]


@pytest.mark.parametrize("name", ["decode-2", "router", "", "x" * 1000])
def test_an_unknown_name_is_answered_with_those_that_there_are(world: World, name: str) -> None:
    answer = ask(world, name)
    assert (
        answer.error == f"there is no engine {name[:100]}; there are: prefill-0, decode-0, decode-1"
    )
    assert not world.draining()


def test_a_launch_that_stops_restarts_nothing(world: World) -> None:
    world.interrupt()
    assert "draining the router" in ask(world, "decode-0").error
    assert world.draining() == {"router"}


def test_what_does_not_leave_is_killed(world: World) -> None:
    ask(world, "decode-0")
    world.drained("decode-0")
    world.exit("decode-0")
    world.pass_time(5)
    assert world.signalled(signal.SIGKILL) == {"decode-0/rank-0", "decode-0/rank-1"}
    for rank in (0, 1):
        world.exit(f"decode-0/rank-{rank}", -9)
    assert spawned_again(world) == DECODE
