"""``pdlaunch drain NAME`` and ``undrain``, as the supervisor sees them."""

from __future__ import annotations

import pytest

from pdlaunch.protocol.control import Answered, Drain, Restart, SetDrained
from tests.launch.fakes import World, serving


@pytest.fixture
def world() -> World:
    return serving(num_decode=2)


def ask(world: World, name: str, *, is_drained: bool = True) -> Answered:
    """Return what the router is answered."""
    world.say("router", SetDrained(question=7, name=name, is_drained=is_drained))
    answer = world.host.sent_to("router", Answered)[-1]
    assert isinstance(answer, Answered)
    assert answer.question == 7
    return answer


def withheld(world: World) -> set[str]:
    """The engines that the router is told to give no work."""
    return {entry.name for entry in world.host.registry("router").entries if entry.withheld}


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-0"])
def test_a_drained_engine_goes_on_without_new_work(world: World, name: str) -> None:
    assert ask(world, name) == Answered(question=7, engine="decode-0")
    assert withheld(world) == {"decode-0"}
    (server,) = [e for e in world.host.registry("router").entries if e.name == "decode-0"]
    assert server.reason == "no new work until `pdlaunch undrain decode-0`"
    assert world.listed("decode-0") == world.listed("decode-0/rank-0") == "ready"
    assert not world.draining(), "it is told nothing, so that it can work again at once"
    assert ask(world, name, is_drained=False).error == ""
    assert not withheld(world)
    assert world.observer.notes == [
        "decode-0 is drained, as was asked",
        "decode-0 is undrained, as was asked",
    ]


def test_it_stays_drained_over_a_restart_and_a_death(world: World) -> None:
    ask(world, "decode-0")
    world.say("router", Restart(question=8, name="decode-0"))
    assert world.host.sent_to("decode-0", Drain)
    world.drained("decode-0")
    for name in ("decode-0", "decode-0/rank-0"):
        world.exit(name)
    for name in ("decode-0", "decode-0/rank-0"):
        world.become_ready(name)
    assert (withheld(world), world.listed("decode-0")) == ({"decode-0"}, "ready")
    world.exit("decode-0", 1)
    world.pass_time(10)
    world.become_ready("decode-0")
    assert (withheld(world), world.listed("decode-0")) == ({"decode-0"}, "ready")
    assert ask(world, "decode-0", is_drained=False).error == ""
    assert not withheld(world)


def test_the_last_engine_that_serves_is_not_drained(world: World) -> None:
    assert not ask(world, "decode-0").notes
    answer = ask(world, "decode-1")
    assert answer.notes == ["no other decode engine serves: its work goes to prefill-0"]
    assert withheld(world) == {"decode-0", "decode-1"}
    refused = ask(world, "prefill-0")
    assert refused.error.startswith("prefill-0 is not drained: no other engine serves")
    assert refused.code == "refused"
    assert withheld(world) == {"decode-0", "decode-1"}
    ask(world, "decode-1", is_drained=False)
    world.exit("decode-1/rank-0", 1)
    assert ask(world, "prefill-0").error, "an engine that starts anew does not serve"


@pytest.mark.parametrize("name", ["decode-2", "router", "", "x" * 1000])
def test_an_unknown_name_is_answered_with_those_that_there_are(world: World, name: str) -> None:
    answer = ask(world, name)
    assert answer.code == "engine_not_found"
    assert (
        answer.error == f"there is no engine {name[:100]}; there are: prefill-0, decode-0, decode-1"
    )


def test_a_launch_that_starts_or_stops_drains_nothing(world: World) -> None:
    world.interrupt()
    answer = ask(world, "decode-0")
    assert (answer.code, answer.error) == (
        "not_now",
        "decode-0 cannot be drained: the launch is draining the router",
    )
    assert not withheld(world)
