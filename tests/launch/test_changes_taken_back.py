"""Engines that were to join a launch, and cannot: they are taken back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pdlaunch.protocol.control import Answered, PairFailed
from tests.launch.changing import Changing


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
