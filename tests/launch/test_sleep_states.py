"""The registry shows which processes sleep."""

from __future__ import annotations

from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import SleepState
from tests.launch.fakes import World, make_plan


def states(world: World) -> dict[str, str]:
    return {entry.name: entry.state for entry in world.host.registry("router").entries}


def test_everyone_hears_of_sleep_and_the_launch_goes_on() -> None:
    world = World(make_plan()).start()
    world.all_ready()
    version = world.host.registry("router").version
    world.say("prefill-0", SleepState(state="draining"))
    assert states(world)["prefill-0"] == "draining"
    world.say("prefill-0/rank-0", SleepState(state="sleeping"))
    world.say("prefill-0", SleepState(state="sleeping"))
    assert {name for name, state in states(world).items() if state == "sleeping"} == {
        "prefill-0",
        "prefill-0/rank-0",
    }
    assert world.phase is LaunchPhase.READY
    world.say("prefill-0/rank-0", SleepState(state="awake"))
    world.say("prefill-0", SleepState(state="awake"))
    assert set(states(world).values()) == {"ready"}
    assert world.host.registry("router").version == version + 5
