from __future__ import annotations

from pdlaunch.protocol.control import Alive
from pdlaunch.protocol.process.bootstrap import Heartbeat


def test_a_loop_that_turns_often_beats_once_an_interval_and_makes_up_for_none() -> None:
    now_s, sent = 50.0, list[Alive]()
    heartbeat = Heartbeat(sent.append, 10.0, lambda: now_s)
    for passed_s, num_sent in [(0.0, 1), (9.9, 1), (0.1, 2), (0.0, 2), (100.0, 3), (0.0, 3)]:
        now_s += passed_s
        heartbeat.beat()
        assert len(sent) == num_sent
