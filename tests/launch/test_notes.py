"""The router is told what people are told, and a new router what happened before it."""

from __future__ import annotations

import signal

from pdlaunch.protocol.control import Happened, PairFailed
from tests.launch.fakes import World, make_plan


def told(world: World) -> list[Happened]:
    return [each for each in world.host.sent_to("router", Happened) if isinstance(each, Happened)]


def test_the_router_hears_of_a_death_and_the_restart() -> None:
    world = World(make_plan()).start().all_ready()
    world.exit("decode-0/rank-0", -signal.SIGKILL)
    assert [each.text for each in told(world)] == world.observer.notes
    assert "decode-0/rank-0" in told(world)[0].text
    assert any("starts again" in each.text for each in told(world))
    assert not [name for name, message in world.host.sent if isinstance(message, Happened)][
        len(told(world)) :
    ], "nobody else is told"


def test_a_failed_pair_names_its_engines() -> None:
    world = World(make_plan()).start().all_ready()
    failed = PairFailed(
        local="decode-0/rank-0", peer="prefill-0/rank-0", error="no route", fatal=False
    )
    world.say("decode-0/rank-0", failed)
    (happened,) = told(world)
    assert (happened.prefill, happened.decode) == ("prefill-0", "decode-0")
    assert "no route" in happened.text


def test_the_next_router_hears_what_happened_before_it_and_how_long_ago() -> None:
    world = World(make_plan()).start().all_ready()
    world.exit("router", -signal.SIGKILL)
    world.host.sent.clear()
    world.pass_time_alive(30)
    world.register("router")
    notes = told(world)
    assert [each.text for each in notes] == world.observer.notes[: len(notes)]
    assert "router" in notes[0].text
    assert notes[0].ago_s > 0
