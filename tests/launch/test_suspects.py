"""The router is told what a rank may have died of."""

from __future__ import annotations

import signal

import pytest

from pdlaunch.protocol.control import Registry, Restart, Suspects
from pdlaunch.protocol.process.step_record import LastStep
from tests.launch.fakes import World, serving

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
