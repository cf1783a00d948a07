from __future__ import annotations

import asyncio
import contextlib

from pdlaunch.protocol.control import Alive
from pdlaunch.protocol.process.control_client import Heartbeat


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_a_loop_that_turns_often_beats_once_an_interval() -> None:
    clock, sent = Clock(), list[Alive]()
    heartbeat = Heartbeat(sent.append, 10.0, clock)
    for _ in range(5):
        heartbeat.beat()
    assert len(sent) == 1
    clock.now_s += 9.9
    heartbeat.beat()
    assert len(sent) == 1
    clock.now_s += 0.1
    heartbeat.beat()
    heartbeat.beat()
    assert len(sent) == 2


def test_a_late_beat_is_not_made_up_for() -> None:
    clock, sent = Clock(), list[Alive]()
    heartbeat = Heartbeat(sent.append, 10.0, clock)
    clock.now_s += 100
    for _ in range(5):
        heartbeat.beat()
    assert len(sent) == 1


async def test_it_is_silent_when_nobody_listens() -> None:
    sent: list[Alive] = []
    heartbeat = Heartbeat(sent.append, 0.0)
    heartbeat.beat()
    await heartbeat.run()
    assert sent == []


async def test_an_event_loop_beats_until_it_is_told_to_stop() -> None:
    enough = asyncio.Event()
    sent: list[Alive] = []

    def send(message: Alive) -> None:
        sent.append(message)
        if len(sent) == 3:
            enough.set()

    task = asyncio.create_task(Heartbeat(send, 0.001).run())
    await enough.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
