from __future__ import annotations

import asyncio
import ctypes
import threading
import weakref
from typing import Any

import pytest

from pdlaunch.http import large_inputs
from pdlaunch.http.large_inputs import LargeInputs
from pdlaunch.protocol.control import Alive
from pdlaunch.protocol.process.bootstrap import Heartbeat


async def test_small_inputs_are_worked_at_in_place() -> None:
    assert await LargeInputs().run(False, threading.get_ident) == threading.get_ident()
    assert await LargeInputs().run(True, threading.get_ident) != threading.get_ident()


async def test_heartbeats_go_out_while_large_inputs_are_worked_at() -> None:
    """Work in Python alone, which never lets go of the interpreter by itself, until three beats
    have been sent.
    """
    beats: list[Alive] = []

    def work() -> int:
        while len(beats) < 3:
            sum(range(1000))
        return len(beats)

    heartbeat = asyncio.create_task(Heartbeat(beats.append, 0.01).run())
    assert await LargeInputs().run(True, work) >= 3
    heartbeat.cancel()


async def test_few_large_inputs_are_worked_at_at_a_time() -> None:
    inputs, lock, together = (
        LargeInputs(),
        threading.Lock(),
        threading.Barrier(large_inputs.NUM_INPUT_THREADS),
    )
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=60)
        with lock:
            running -= 1

    await asyncio.gather(*[inputs.run(True, work) for _ in range(8)])
    assert most == large_inputs.NUM_INPUT_THREADS


async def test_memory_goes_back_once_after_large_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(large_inputs, "DELAY_S", 0.01)
    monkeypatch.setattr(large_inputs, "trim", trimmed.append)
    memory_return = large_inputs.MemoryReturn()
    memory_return.after(large_inputs.LARGE_BYTES - 1)
    await asyncio.sleep(0.05)
    assert not trimmed
    for _ in range(5):
        memory_return.after(large_inputs.LARGE_BYTES)
    while not trimmed:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.01)
    assert trimmed == [False]
    memory_return.after(large_inputs.COLLECT_BYTES)
    while len(trimmed) < 2:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.01)
    assert trimmed == [False, True]


def test_malloc_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Glibc:
        malloc_trim = staticmethod(asked.append)

    libraries: list[Any] = [Glibc, object()]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libraries.pop(0))
    large_inputs.trim()
    large_inputs.trim()
    assert asked == [0]


def test_what_errors_hold_in_cycles_goes_too() -> None:
    class Body:
        """Stands for a body that a frame of a traceback holds."""

    body = Body()
    gone = weakref.ref(body)
    cycle: list[object] = [body]
    cycle.append(cycle)
    del body, cycle
    large_inputs.trim(collect=True)
    assert gone() is None
