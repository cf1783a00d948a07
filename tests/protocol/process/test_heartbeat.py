"""A loop that turns says so once an interval."""

from __future__ import annotations

from pdlaunch.protocol.control import Alive
from pdlaunch.protocol.process.bootstrap import Heartbeat


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_a_loop_that_turns_often_beats_once_an_interval_and_makes_up_for_none() -> None:
    clock, sent = Clock(), list[Alive]()
    heartbeat = Heartbeat(sent.append, 10.0, clock)
    for passed_s, num_sent in [(0.0, 1), (9.9, 1), (0.1, 2), (0.0, 2), (100.0, 3), (0.0, 3)]:
        clock.now_s += passed_s
        heartbeat.beat()
        assert len(sent) == num_sent


async def test_it_is_silent_when_nobody_listens() -> None:
    sent: list[Alive] = []
    heartbeat = Heartbeat(sent.append, 0.0)
    heartbeat.beat()
    await heartbeat.run()
    assert sent == []
