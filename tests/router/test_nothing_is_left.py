"""The router holds no more after mixed work than before: no connection, no task.

``make soak`` does it for minutes, with real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path

from tests.router.conftest import Stand, pair
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


FAULTS = ((None, None), (0, None), (None, 0), (1, 1), (None, 3), (3, 0))
"""Chunks after which the prefill engine and one of two decode engines break off, by round."""


def num_descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


async def ask(stand: Stand, number: int, *, leaves: bool = False) -> bytes | None:
    """Read the answer to its end, or leave somewhere before it (None)."""
    chance = random.Random(number)
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
    body = completion(prompt=f"prompt {number}", stream=chance.random() < 0.7)
    raw = json.dumps(body).encode()
    request = HEAD % len(raw) + raw
    try:
        if leaves := leaves or chance.random() < 0.5:
            writer.write(request[: chance.choice((10, -1, len(request)))])
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                for _ in range(chance.randrange(30)):
                    await asyncio.sleep(0)
        else:
            writer.write(request)
        return None if leaves else await reader.read()
    finally:
        writer.transport.abort()


async def rest(stand: Stand) -> None:
    """Wait until no request runs, and close what rests."""
    await until(lambda: not stand.router.admission.in_flight)
    await stand.state.settled()
    await stand.state.client._calls.close()


async def test_of_clients_that_leave_and_engines_that_break_off_nothing_is_left(
    stand: Stand,
) -> None:
    prefill, decode = pair()
    other = FakeEngine("decode-1", "decode")
    await stand.start([prefill, decode, other])
    assert await ask(stand, 1)
    await rest(stand)
    before, tasks = num_descriptors(), len(asyncio.all_tasks())
    for round_, (prefill.die_after, decode.die_after) in enumerate(FAULTS):
        numbers = range(12 * round_, 12 * round_ + 12)
        answers = await asyncio.gather(*(ask(stand, number) for number in numbers))
        assert any(answers)
        assert all(answer is None or b"choices" in answer for answer in answers)
        await rest(stand)
    # Engines that would never end.
    decode.die_after, decode.hold_after, other.hold_after = None, 1, 1
    await asyncio.gather(*(ask(stand, number, leaves=True) for number in range(100, 130)))
    await rest(stand)
    await until(lambda: num_descriptors() <= before)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert all(engine.num_streams == engine.num_works == 0 for engine in stand.pool.engines)
