"""``pdlaunch drain``, ``restart``, ``scale`` and ``role`` as the supervisor sees them."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.protocol.control import (
    Answered,
    Command,
    Drain,
    Restart,
    SetDrained,
    SleepState,
)
from tests.launch.changing import CORES, GPUS, Changing
from tests.launch.fakes import World, serving
from tests.launch.test_deaths import crash_loop

ENGINE = ("decode-0", "decode-0/rank-0", "decode-0/rank-1")
DONE = Answered(question=7)


@pytest.fixture
def world() -> World:
    return serving(Timing(drain_s=30, stop_s=5), num_decode=2, tp_size=2)


def restart(name: str) -> Restart:
    return Restart(question=7, name=name)


def drain(name: str) -> SetDrained:
    return SetDrained(question=7, name=name, is_drained=True)


def undrain(name: str) -> SetDrained:
    return SetDrained(question=7, name=name, is_drained=False)


@pytest.mark.parametrize("command", [restart, drain])
@pytest.mark.parametrize("name", ["decode-2", "router", "", "x" * 1000])
def test_an_unknown_name_is_answered_with_those_that_there_are(
    world: World, command: Callable[[str], Command], name: str
) -> None:
    answer = world.ask(command(name))
    there = "prefill-0, decode-0, decode-1"
    assert answer.code == "engine_not_found"
    assert answer.error == f"there is no engine {name[:100]}; engines are: {there}"


def test_a_command_whose_asker_has_given_up_is_dropped(world: World) -> None:
    late = Restart(question=7, name="decode-0", expires_at=world.clock() - 1)
    world.say("router", late)
    assert not world.supervisor.wanted.engines["decode-0"].restart


# Drains


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-0"])
def test_a_drained_engine_goes_on_without_new_work(world: World, name: str) -> None:
    assert world.ask(drain(name)) == Answered(question=7, engine="decode-0")
    assert world.withheld() == {"decode-0"}
    assert world.entries()["decode-0"].reason == "no new work until `pdlaunch undrain decode-0`"
    assert world.listed("decode-0") == world.listed("decode-0/rank-0") == "ready"
    assert not world.draining(), "it is told nothing, so that it can work again at once"
    assert world.ask(undrain(name)).error == ""
    assert not world.withheld()
    notes = [f"decode-0 is {verb}, as requested" for verb in ("drained", "undrained")]
    assert world.observer.notes == notes


def test_it_stays_drained_over_a_restart_and_a_death(world: World) -> None:
    world.ask(drain("decode-0"))
    world.ask(restart("decode-0"))
    world.drained("decode-0")
    for name in ENGINE:
        world.exit(name)
    world.become_ready(*ENGINE)
    world.exit("decode-0", 1)
    world.pass_time(10)
    world.become_ready("decode-0")
    assert (world.withheld(), world.listed("decode-0")) == ({"decode-0"}, "ready")
    assert world.ask(undrain("decode-0")).error == ""
    assert not world.withheld()


def test_the_last_engine_that_serves_is_not_drained(world: World) -> None:
    assert not world.ask(drain("decode-0")).notes
    answer = world.ask(drain("decode-1"))
    assert answer.notes == ["no other decode engine serves: its work goes to prefill-0"]
    refused = world.ask(drain("prefill-0"))
    assert refused.error.startswith("prefill-0 is not drained: no other engine serves")
    assert refused.code == "refused"
    assert world.withheld() == {"decode-0", "decode-1"}
    world.ask(undrain("decode-1"))
    world.exit("decode-1/rank-0", 1)
    assert world.ask(drain("prefill-0")).error, "an engine that starts anew does not serve"


# Restarts


def spawned_again(world: World) -> set[str]:
    return {name for name, incarnation in world.host.spawned if incarnation == 2}


@pytest.mark.parametrize("name", ["decode-0", "decode-0/rank-1"])
def test_an_engine_that_serves_finishes_what_runs_before_it_is_stopped(
    world: World, name: str
) -> None:
    expected = Answered(question=7, engine="decode-0", incarnation=1)
    # Asked twice it is restarted once.
    assert [world.ask(restart(name)) for _ in range(2)] == [expected] * 2
    assert world.host.sent_to("decode-0", Drain) == [Drain(timeout_s=30)]
    assert world.draining() == {"decode-0"}
    assert world.listed("decode-0") == "draining"
    world.pass_time_alive(10)
    assert not world.stopped()
    world.drained("decode-0")
    assert world.stopped() == set(ENGINE)
    assert world.listed("decode-0") is None
    for process in ENGINE[:2]:
        world.exit(process)
    assert not spawned_again(world)
    world.exit(ENGINE[2])
    assert spawned_again(world) == set(ENGINE)
    world.become_ready(*ENGINE)
    assert world.listed("decode-0") == "ready"
    assert world.failure is None
    assert not world.host.signals


def test_what_still_runs_after_the_drain_is_stopped_and_then_killed(world: World) -> None:
    world.ask(restart("decode-0"))
    assert world.supervisor.next_tick_at() <= world.clock.now + 30
    world.pass_time_alive(30)
    assert world.stopped() == set(ENGINE)
    world.exit("decode-0")
    world.pass_time(5)
    assert world.signalled(signal.SIGKILL) == set(ENGINE[1:])
    for rank in ENGINE[1:]:
        world.exit(rank, -9)
    assert spawned_again(world) == set(ENGINE)


def test_a_death_in_the_drain_hurries_it(world: World) -> None:
    world.ask(restart("decode-0"))
    world.exit("decode-0/rank-0", -11)
    assert world.stopped() == {"decode-0", "decode-0/rank-1"}
    world.exit("decode-0/rank-1")
    world.exit("decode-0")
    assert spawned_again(world) == set(ENGINE)


def test_an_engine_that_is_given_up_or_backs_off_starts_at_once() -> None:
    world = serving(num_decode=2)
    crash_loop(world, "decode-0")
    assert world.ask(restart("decode-0")).error == ""
    assert world.stopped() == {"decode-0/rank-0"}
    world.exit("decode-0/rank-0")
    assert {world.state(name) for name in ENGINE[:2]} == {"starting"}
    world.become_ready(*ENGINE[:2])
    world.exit("decode-0/rank-0", 1)
    world.ask(restart("decode-0"))
    world.exit("decode-0")
    assert {world.state(name) for name in ENGINE[:2]} == {"starting"}


# Changes of the engines


def test_a_new_engine_gets_work_once_its_pairs_are_proven(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    (start,) = world.plan_of(prefill=2).starts
    assert (start.name, start.host, start.devices) == ("prefill-1", "local", ["cpu"])
    assert world.placed("prefill-1").engines.replicas == 2
    world.become_whole("prefill-1")
    assert world.listed("prefill-1") == "ready", "decode ranks find it"
    assert world.given_work() == {"prefill-0", "decode-0"}
    assert not world.answered().is_done
    world.connect("decode-0/rank-0", "prefill-1/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0"}
    assert world.answered() == DONE
    sent = [message for name, message in world.host.sent if name == "router"]
    assert sent.index(world.host.registry("router")) < sent.index(world.answered()), (
        "who asks at once what engines there are must find them"
    )
    assert world.failure is None


def test_an_engine_that_goes_finishes_and_leaves_nothing(tmp_path: Path) -> None:
    world = Changing(tmp_path, prefill={"replicas": 2})
    planned = world.plan_of(prefill=1, drain_timeout_s=12.0)
    assert (planned.stops, planned.drain_s) == ({"prefill-1": 0}, 12)
    assert world.given_work() == {"prefill-0", "decode-0"}
    refused = world.ask(undrain("prefill-1"))
    assert refused.error == "prefill-1 cannot be undrained: it is being removed"
    assert world.host.sent_to("prefill-1", Drain) == [Drain(timeout_s=12)]
    world.pass_time_alive(10)
    world.drained("prefill-1")
    assert world.stopped() == {"prefill-1", "prefill-1/rank-0"}
    world.exit("prefill-1/rank-0")
    assert "prefill-1" in world.engines
    world.exit("prefill-1")
    assert world.answered() == DONE
    assert world.engines == {"prefill-0", "decode-0"}
    listed = {entry.engine for entry in world.host.registry("router").entries}
    assert listed == {"", "prefill-0", "decode-0"}
    assert world.bootstraps.gone == world.host.forgotten == ["prefill-1"]
    assert (world.status.num_missing_pairs, len(world.status.pairs)) == (0, 1)


def test_without_a_free_gpu_it_says_who_has_them(tmp_path: Path) -> None:
    world = Changing(tmp_path, GPUS, decode={"replicas": 2})
    answer = world.change(decode=3)
    assert answer.code == "refused"
    assert answer.error.startswith(
        "there is no room for decode-2: an engine needs 1 free GPU of one host, but local has 3, "
        "GPU 0 used by prefill-0, GPU 1 used by decode-0, GPU 2 used by decode-1"
    )
    # One that stops in the same command makes room.
    assert world.plan_of(prefill=2, decode=1).stops_first
    world.leave("decode-1")
    assert world.placed("prefill-1").device_indices == (2,)


def test_a_sleeping_peer_proves_its_pair_when_it_is_back(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    for name in ("decode-1", "decode-1/rank-0"):
        world.say(name, SleepState(state="sleeping"))
    world.change(prefill=2)
    world.become_whole("prefill-1")
    world.connect("decode-0/rank-0", "prefill-1/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0"}


def test_a_dry_run_and_what_is_there_already_do_nothing(tmp_path: Path) -> None:
    world = Changing(tmp_path, replace(CORES, num_cpus=2))
    answer = world.change(prefill=2, dry_run=True)
    assert answer.is_done
    assert answer.change is not None
    assert answer.change.replicas == {"prefill": 2, "decode": 1, "both": 0}
    assert any(note.startswith("PD412 prefill.") for note in answer.notes), "3 ranks on 2 cores"
    answer = world.change(decode=2, dry_run=True)
    assert any(note.startswith("PD412 decode.replicas: ") for note in answer.notes)
    for answer in (
        world.change(prefill=1, decode=1),
        world.change(engine="decode-0", role="decode"),
    ):
        assert (answer.error, answer.is_done) == ("", True)
        assert answer.notes == ["there is nothing to do: the engines are as you want them"]
    assert world.engines == {"prefill-0", "decode-0"}
    assert not world.observer.notes


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"decode": 0}, "PD102 decode.replicas: 1 prefill engine, but no decode engine"),
        ({"prefill": 0, "decode": 0}, "no engine would be left"),
        ({"engine": "decode-0", "role": "prefill"}, "PD102"),
        ({"engine": "decode-4", "role": "prefill"}, "there is no engine decode-4; engines are: "),
    ],
)
def test_a_launch_that_would_break_is_refused(
    tmp_path: Path, wanted: dict[str, Any], error: str
) -> None:
    world = Changing(tmp_path)
    answer = world.change(**wanted)
    assert answer.is_done
    assert answer.error.startswith(error)
    assert world.engines == {"prefill-0", "decode-0"}
    assert not world.draining()


def test_of_a_role_those_that_do_not_serve_go_first_and_never_the_last_one_that_does(
    tmp_path: Path,
) -> None:
    world = Changing(tmp_path, decode={"replicas": 3})
    world.ask(drain("decode-1"))
    assert world.plan_of(decode=2, dry_run=True).stops == {"decode-1": 0}
    world.exit("decode-0", 1)
    assert world.plan_of(decode=1, dry_run=True).stops == {"decode-0": 0, "decode-1": 0}
    world.ask(drain("prefill-0"))
    answer = world.change(engine="decode-2", role="prefill")
    assert "decode-2 must not stop: no other engine" in answer.error
    assert not world.draining()


def test_one_change_at_a_time(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(prefill=2, decode=1)
    answer = world.change(decode=3)
    assert answer.code == "not_now"
    assert answer.error.startswith("another change is under way: +prefill-1 -decode-1; ")
    assert world.change(decode=3, dry_run=True).error == ""
    refusal = world.ask(restart("prefill-1"))
    assert refusal.error == "prefill-1 cannot be restarted: it is being added"


@pytest.mark.parametrize("wanted", [{"prefill": 2}, {"decode": 1}], ids=["joins", "leaves"])
def test_ctrl_c_in_the_middle_ends_all(tmp_path: Path, wanted: dict[str, int]) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(**wanted)
    world.interrupt()
    assert world.change(decode=1).error.endswith("the launch is draining")
    world.interrupt()
    world.exit_all()
    assert world.supervisor.done
    assert world.failure is None


def test_all_ranks_of_many_engines_are_told_of_their_new_peers(tmp_path: Path) -> None:
    world = Changing(tmp_path, replace(CORES, num_cpus=64), decode={"replicas": 8})

    def told() -> set[str]:
        return {entry.engine for entry in world.host.registry("prefill-0/rank-0").entries}

    everyone = told()
    assert len(everyone) == 10, "all engines, and the router without one"
    world.change(decode=9)
    world.become_whole("decode-8")
    world.connect("decode-8/rank-0", "prefill-0/rank-0")
    assert "decode-8" in world.given_work()
    assert told() == everyone - {""} | {"decode-8"}
    world.change(decode=8)
    world.leave("decode-8")
    assert told() == everyone


def dies(world: Changing) -> str:
    world.register("prefill-1/rank-0")
    world.fail("prefill-1/rank-0", "no memory")
    world.exit("prefill-1/rank-0", 1)
    assert world.signalled(signal.SIGTERM) == {"prefill-1"}
    return "prefill-1/rank-0 failed: no memory"


def is_late(world: Changing) -> str:
    world.pass_time_alive(60)
    return "not ready after 60 s: prefill-1/rank-0 is starting; prefill-1 is starting"


def is_late_to_prove_its_pair(world: Changing) -> str:
    world.become_whole("prefill-1")
    world.pass_time_alive(60)
    return "not ready after 60 s: decode-0/rank-0 has no path to prefill-1"


@pytest.mark.parametrize("fails", [dies, is_late, is_late_to_prove_its_pair])
def test_a_new_engine_that_fails_is_taken_back(
    tmp_path: Path, fails: Callable[[Changing], str]
) -> None:
    world = Changing(tmp_path)
    world.change(prefill=2)
    why = fails(world)
    for name in {"prefill-1", "prefill-1/rank-0"} & world.host.running.keys():
        world.exit(name, -15)
    assert world.answered() == Answered(question=7, error=f"prefill-1 cannot be added: {why}")
    assert world.engines == world.given_work() == {"prefill-0", "decode-0"}
    assert world.bootstraps.gone == ["prefill-1"]
    assert world.failure is None
    world.change(prefill=2)
    assert world.host.running["prefill-1"] == 2, "nobody takes it for the one before"


def test_a_turned_engine_that_does_not_start_is_told_to_be_gone(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(engine="decode-1", role="prefill")
    world.leave("decode-1")
    world.exit("prefill-1", 1)
    world.exit("prefill-1/rank-0", -15)
    assert world.answered().error.endswith("; decode-1 is gone already")
    assert world.given_work() == {"prefill-0", "decode-0"}


def test_a_new_engine_whose_host_is_lost_before_its_start_waits_for_it(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(engine="decode-1", role="prefill")
    world.supervisor.places.lost("local", None)
    world.leave("decode-1")
    world.supervisor.places.joined(world.placed("prefill-1").host)
    world.pass_time(1)
    assert world.host.running["prefill-1"] == 1
