"""``pdlaunch scale`` and ``role`` as the supervisor sees them: real plans, no processes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.protocol.control import (
    Answered,
    ChangeEngines,
    Drain,
    EngineIdle,
    PairFailed,
    Restart,
    SetDrained,
    SleepState,
)
from tests.launch.changing import CORES, GPUS, Changing
from tests.launch.test_deaths import give_up


def test_a_new_engine_gets_work_once_its_pairs_are_proven(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    begun = world.change(prefill=2)
    assert (begun.error, begun.is_done) == ("", False)
    assert begun.change is not None
    assert [(each.name, each.host, each.devices) for each in begun.change.starts] == [
        ("prefill-1", "local", ["cpu"])
    ]
    assert world.adopted.engines["prefill-1"].engines.replicas == 2
    assert world.host.running.keys() >= {"prefill-1", "prefill-1/rank-0"}
    world.become_whole("prefill-1")
    assert world.listed("prefill-1") == "ready", "decode ranks find it"
    assert world.given_work() == {"prefill-0", "decode-0"}
    assert not world.answered().is_done
    world.connect("decode-0/rank-0", "prefill-1/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0"}
    assert world.answered() == Answered(question=7)
    sent = [message for name, message in world.host.sent if name == "router"]
    assert sent.index(world.host.registry("router")) < sent.index(world.answered()), (
        "who asks at once what engines there are must find them"
    )
    assert world.failure is None


def test_an_engine_that_goes_finishes_and_leaves_nothing(tmp_path: Path) -> None:
    world = Changing(tmp_path, prefill={"replicas": 2})
    begun = world.change(prefill=1)
    assert begun.change is not None
    assert (begun.change.stops, begun.change.drain_s) == (["prefill-1"], 30)
    assert world.given_work() == {"prefill-0", "decode-0"}
    world.say("router", SetDrained(question=7, name="prefill-1", is_drained=False))
    assert world.answered().error == "prefill-1 cannot be undrained: it is being removed"
    assert world.host.sent_to("prefill-1", Drain) == [Drain(timeout_s=30)]
    world.pass_time_alive(10)
    world.drained("prefill-1")
    assert world.host.sent_to("router", EngineIdle) == [EngineIdle(engine="prefill-1")]
    assert not world.stopped(), "its blocks are yet to be read"
    world.say("router", EngineIdle(engine="prefill-1"))
    assert world.stopped() == {"prefill-1", "prefill-1/rank-0"}
    world.exit("prefill-1/rank-0")
    assert "prefill-1" in world.engines
    world.exit("prefill-1")
    assert world.answered() == Answered(question=7)
    assert world.engines == {"prefill-0", "decode-0"}
    assert {entry.engine for entry in world.host.registry("router").entries} == {
        "",
        "prefill-0",
        "decode-0",
    }
    assert world.adopted.gone == world.host.forgotten == ["prefill-1"]
    assert world.supervisor.seen.status().num_missing_pairs == 0
    assert len(world.supervisor.seen.status().pairs) == 1


def test_what_still_runs_after_the_limit_is_not_waited_for(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(decode=1, drain_s=12.0)
    assert world.host.sent_to("decode-1", Drain) == [Drain(timeout_s=12)]
    assert world.supervisor.next_tick_at() <= world.clock.now + 12
    world.pass_time_alive(12)
    assert world.stopped() == {"decode-1", "decode-1/rank-0"}
    world.pass_time(5)
    assert world.signalled(signal.SIGKILL) == {"decode-1", "decode-1/rank-0"}
    for name in ("decode-1", "decode-1/rank-0"):
        world.exit(name, -9)
    assert world.answered() == Answered(question=7)
    assert world.failure is None


def test_one_that_was_given_up_goes_at_once(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    give_up(world)
    world.say("router", ChangeEngines(question=7, replicas={"decode": 1}))
    begun, done = world.host.sent_to("router", Answered)
    assert isinstance(begun, Answered)
    assert begun.change is not None
    assert begun.change.stops == ["decode-0"]
    assert done == Answered(question=7)
    assert world.engines == {"prefill-0", "decode-1"}
    world.pass_time(2000)
    assert "decode-0" not in world.host.running, "nobody tries it again"


def test_a_turned_engine_leaves_before_the_other_starts_on_its_device(tmp_path: Path) -> None:
    world = Changing(tmp_path, GPUS, decode={"replicas": 2})
    assert world.plan.ranks("decode")[1].devices == ("cuda:2",)
    begun = world.turn("decode-1/rank-0", "prefill")
    assert begun.change is not None
    (start,) = begun.change.starts
    assert (start.name, start.devices) == ("prefill-1", ["cuda:2"])
    assert (begun.change.stops, begun.change.stops_first) == (["decode-1"], True)
    assert "prefill-1" not in world.host.running
    world.leave("decode-1")
    assert world.host.running["prefill-1"] == 1
    assert world.adopted.engines["prefill-1"].device_indices == (2,)
    world.become_whole("prefill-1")
    world.connect("decode-0/rank-0", "prefill-1/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0"}
    assert world.answered() == Answered(question=7)
    # And back: what runs is what the next change begins with.
    world.turn("prefill-1", "decode")
    world.leave("prefill-1")
    assert world.host.running["decode-1"] == 2, "its incarnations go on"
    assert world.adopted.engines["decode-1"].device_indices == (2,)


def test_without_a_free_gpu_it_says_who_has_them(tmp_path: Path) -> None:
    world = Changing(tmp_path, GPUS, decode={"replicas": 2})
    answer = world.change(decode=3)
    assert answer.error.startswith(
        "there is no room for decode-2: an engine needs 1 free GPU of one host, and local has 3, "
        "GPU 0 of prefill-0, GPU 1 of decode-0, GPU 2 of decode-1"
    )
    assert answer.code == "refused"
    assert world.engines == {"prefill-0", "decode-0", "decode-1"}


def test_one_that_stops_in_the_same_command_makes_room(tmp_path: Path) -> None:
    world = Changing(tmp_path, GPUS, decode={"replicas": 2})
    begun = world.change(prefill=2, decode=1)
    assert begun.change is not None
    assert begun.change.stops_first
    world.leave("decode-1")
    assert world.adopted.engines["prefill-1"].device_indices == (2,)


def test_pairs_make_room_for_engines_of_both_roles_and_come_back(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    world.change(prefill=0, decode=0, both=2)
    for engine in ("both-0", "both-1"):
        world.become_whole(engine)
    assert world.draining() == {"prefill-0", "decode-0"}
    for engine in ("prefill-0", "decode-0"):
        world.leave(engine)
    assert world.given_work() == {"both-0", "both-1"}
    assert world.answered() == Answered(question=7)
    assert world.supervisor.seen.status().num_missing_pairs == 0
    world.change(prefill=1, decode=1, both=0)
    for engine in ("prefill-0", "decode-0"):
        world.become_whole(engine)
    assert world.given_work() == {"both-0", "both-1"}
    world.connect("decode-0/rank-0", "prefill-0/rank-0")
    assert world.given_work() == {"prefill-0", "decode-0"}
    for engine in ("both-0", "both-1"):
        world.leave(engine)
    assert world.engines == {"prefill-0", "decode-0"}


def test_a_sleeping_peer_proves_its_pair_when_it_is_back(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    for name in ("decode-1", "decode-1/rank-0"):
        world.say(name, SleepState(state="sleeping"))
    world.change(prefill=2)
    world.become_whole("prefill-1")
    world.connect("decode-0/rank-0", "prefill-1/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0"}


def test_a_dry_run_does_nothing(tmp_path: Path) -> None:
    world = Changing(tmp_path, replace(CORES, num_cpus=2), decode={"replicas": 1})
    answer = world.change(prefill=2, dry_run=True)
    assert answer.is_done
    assert answer.change is not None
    assert answer.change.replicas == {"prefill": 2, "decode": 1, "both": 0}
    assert any(note.startswith("PD412") for note in answer.notes), "3 ranks on 2 cores"
    assert world.engines == {"prefill-0", "decode-0"}
    assert not world.adopted.engines
    assert not world.observer.notes


def test_what_is_there_already_needs_nothing(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    for answer in (world.change(prefill=1, decode=1), world.turn("decode-0", "decode")):
        assert (answer.error, answer.is_done) == ("", True)
        assert answer.notes == ["there is nothing to do: the engines are as you want them"]
    assert not world.observer.notes


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"decode": 0}, "PD102 decode.replicas: 1 prefill engine, but no decode engine"),
        ({"prefill": 0, "decode": 0}, "no engine would be left"),
        ({"turn": "decode-0", "role": "prefill"}, "PD102"),
        ({"turn": "decode-4", "role": "prefill"}, "there is no engine decode-4; there are: "),
        ({"prefill": 9999}, "prefill=9999 is no number of engines"),
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


def test_of_a_role_those_that_do_not_serve_go_first(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 3})
    world.say("router", SetDrained(question=1, name="decode-1", is_drained=True))
    assert world.change(decode=2, dry_run=True).change is not None
    stops = world.change(decode=2, dry_run=True).change
    assert stops is not None
    assert stops.stops == ["decode-1"]
    world.exit("decode-0", 1)
    stops = world.change(decode=1, dry_run=True).change
    assert stops is not None
    assert stops.stops == ["decode-0", "decode-1"]


def test_the_last_engine_that_serves_does_not_go(tmp_path: Path) -> None:
    world = Changing(tmp_path, GPUS, prefill={"replicas": 1}, decode={"replicas": 2})
    for name in ("prefill-0", "decode-0"):
        world.say("router", SetDrained(question=1, name=name, is_drained=True))
    answer = world.turn("decode-1", "prefill")
    assert "decode-1: no other engine serves" in answer.error
    assert not world.draining()


def test_one_change_at_a_time(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.change(prefill=2, decode=1)
    answer = world.change(decode=3)
    assert (answer.code, answer.error) == (
        "not_now",
        "another change is under way: +prefill-1 -decode-1; `pdlaunch status` shows when it is "
        "done",
    )
    assert world.change(decode=3, dry_run=True).error == ""
    world.say("router", Restart(question=9, name="prefill-1"))
    refusal = world.host.sent_to("router", Answered)[-1]
    assert isinstance(refusal, Answered)
    assert refusal.error == "prefill-1 cannot be restarted: it is being added"


@pytest.mark.parametrize("joining", [True, False])
def test_ctrl_c_in_the_middle_ends_all(tmp_path: Path, joining: bool) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    if joining:
        world.change(prefill=2)
    else:
        world.change(decode=1)
    world.interrupt()
    assert world.change(decode=1).error == (
        "engines cannot change: the launch is draining the router"
    )
    world.interrupt()
    world.exit_all()
    assert world.supervisor.done
    assert world.failure is None


def test_all_ranks_of_many_engines_are_told_of_their_new_peers(tmp_path: Path) -> None:
    world = Changing(tmp_path, replace(CORES, num_cpus=64), decode={"replicas": 8})
    everyone = {entry.engine for entry in world.host.registry("prefill-0/rank-0").entries}
    assert len(everyone) == 10, "all engines, and the router without one"
    world.change(decode=9)
    world.become_whole("decode-8")
    world.connect("decode-8/rank-0", "prefill-0/rank-0")
    assert "decode-8" in world.given_work()
    told = {entry.engine for entry in world.host.registry("prefill-0/rank-0").entries}
    assert told == everyone - {""} | {"decode-8"}
    world.change(decode=8)
    world.leave("decode-8")
    told = {entry.engine for entry in world.host.registry("prefill-0/rank-0").entries}
    assert told == everyone


def test_new_engines_of_both_sides_prove_the_pair_among_them(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    world.change(prefill=2, decode=2)
    for engine in ("prefill-1", "decode-1"):
        world.become_whole(engine)
    pairs = [("decode-0", "prefill-1"), ("decode-1", "prefill-0"), ("decode-1", "prefill-1")]
    for decode, prefill in pairs:
        assert world.given_work() == {"prefill-0", "decode-0"}
        world.connect(f"{decode}/rank-0", f"{prefill}/rank-0")
    assert world.given_work() == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


def test_a_new_engine_that_dies_is_taken_back(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    world.change(prefill=2)
    world.register("prefill-1/rank-0")
    world.fail("prefill-1/rank-0", "no memory")
    world.exit("prefill-1/rank-0", 1)
    assert world.signalled(signal.SIGTERM) == {"prefill-1"}
    world.exit("prefill-1", -15)
    assert world.answered() == Answered(
        question=7,
        error="prefill-1 cannot be added: prefill-1/rank-0 ended with exit code 1: no memory",
    )
    assert world.engines == {"prefill-0", "decode-0"}
    assert world.adopted.gone == ["prefill-1"]
    assert world.failure is None
    world.change(prefill=2)
    assert world.host.running["prefill-1"] == 2, "nobody takes it for the one before"


def test_a_new_engine_whose_pair_can_never_be_is_taken_back(tmp_path: Path) -> None:
    world = Changing(tmp_path)
    world.change(prefill=2)
    world.become_whole("prefill-1")
    world.say(
        "decode-0/rank-0",
        PairFailed(local="decode-0/rank-0", peer="prefill-1/rank-0", error="dtype", fatal=True),
    )
    assert world.stopped() == {"prefill-1", "prefill-1/rank-0"}
    for name in ("prefill-1", "prefill-1/rank-0"):
        world.exit(name)
    assert world.answered().error == (
        "prefill-1 cannot be added: decode-0/rank-0 cannot use prefill-1/rank-0: dtype"
    )
    assert world.given_work() == {"prefill-0", "decode-0"}


@pytest.mark.parametrize("starts", [True, False])
def test_a_new_engine_that_is_late_is_taken_back(tmp_path: Path, starts: bool) -> None:
    world = Changing(tmp_path)
    world.change(decode=2)
    if starts:
        world.become_whole("decode-1")
    assert world.supervisor.next_tick_at() <= world.clock.now + 60
    world.pass_time_alive(60)
    world.exit("decode-1/rank-0", -15)
    world.exit("decode-1", -15)
    assert world.answered().error == "decode-1 cannot be added: not ready after 60 s: " + (
        "decode-1/rank-0 has no path to prefill-0"
        if starts
        else "decode-1/rank-0 is starting; decode-1 is starting"
    )


def test_a_turned_engine_that_does_not_start_is_told_to_be_gone(tmp_path: Path) -> None:
    world = Changing(tmp_path, decode={"replicas": 2})
    world.turn("decode-1", "prefill")
    world.leave("decode-1")
    world.exit("prefill-1", 1)
    world.exit("prefill-1/rank-0", -15)
    assert world.answered().error.endswith("; decode-1 is gone already")
    assert world.given_work() == {"prefill-0", "decode-0"}
