"""Clients that go away, and a router that leaves: nothing runs on, no lease is kept."""

import asyncio
import contextlib
import json
import random
from typing import Any

import pytest

from tests.engine.memory.open_files import num_open_fds
from tests.http.loop_clock import pass_time
from tests.router.conftest import SPEC, Answer, Stand, pair
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion, expected_text

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def request(**fields: Any) -> bytes:
    raw = json.dumps(completion(**fields)).encode()
    return HEAD % len(raw) + raw


async def send(stand: Stand, raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.port, limit=2**10)
    writer.write(raw)
    return reader, writer


async def all_is_quiet(stand: Stand) -> None:
    await until(lambda: not stand.router.admission.in_flight)
    await stand.state.settled()
    assert all(engine.kv_tokens == engine.num_streams == 0 for engine in stand.pool.engines)
    assert stand.metric('pdlaunch_router_request_errors_total{model_name="tiny",status="499"}') == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_while_prefill_works(stand: Stand, stream: bool) -> None:
    prefill, decode = await stand.start_pair()
    prefill.hold_prefill = True
    _, writer = await send(stand, request(stream=stream))
    await prefill.holding.wait()
    writer.close()
    await until(lambda: prefill.num_aborted)
    await all_is_quiet(stand)
    assert not decode.seen
    # Its answer may have been on the way.
    assert len(prefill.released) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_after_prefill_before_decode_has_said_anything(stand: Stand, stream: bool) -> None:
    prefill, decode = await stand.start_pair()
    decode.hold_after = 0
    _, writer = await send(stand, request(stream=stream))
    await decode.holding.wait()
    assert prefill.leases
    writer.close()
    await until(lambda: decode.num_aborted)
    await all_is_quiet(stand)
    assert not prefill.leases
    assert stand.metric("pdlaunch_router_releases_total") == 1


@pytest.mark.parametrize("how", ["close", "reset", "half close"])
async def test_while_decode_streams(stand: Stand, how: str) -> None:
    prefill, decode = await stand.start_pair()
    decode.hold_after = 2
    reader, writer = await send(stand, request(stream=True))
    await decode.holding.wait()
    for _ in range(3):
        await reader.readuntil(b"text_completion")
    if how == "close":
        writer.close()
    elif how == "reset":
        writer.transport.abort()
    else:
        writer.write_eof()
    await until(lambda: decode.num_aborted)
    await all_is_quiet(stand)
    assert not prefill.released
    if how == "half close":
        last = (await reader.read()).split(b"data: ")[-1]
        assert b'"code":"connection_half_closed"' in last
    writer.close()


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_half_closed_connection_is_told_why_it_gets_no_answer(
    stand: Stand, at_once: bool
) -> None:
    _, decode = await stand.start_pair()
    decode.hold_after = 0
    reader, writer = await send(stand, request())
    if not at_once:
        await decode.holding.wait()
    writer.write_eof()
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert error["code"] == "connection_half_closed"
    assert "keep the connection open" in error["message"]
    await all_is_quiet(stand)
    assert decode.num_aborted == (not at_once)
    writer.close()
    # Nothing goes on after an answer that is only read, so it is given.
    reader, writer = await send(stand, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    writer.write_eof()
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_body_that_ends_early_is_refused_at_once(stand: Stand, caplog: Any) -> None:
    await stand.start_pair()
    reader, writer = await send(stand, HEAD % 9 + b"{")
    await until(lambda: stand.router._bodies.held_bytes)
    writer.write_eof()
    assert b"connection_half_closed" in await reader.read()
    writer.close()
    assert not caplog.records


async def test_a_client_that_does_not_read_is_left_in_the_end(stand: Stand) -> None:
    _, decode = await stand.start_pair()
    # More than the sockets between them hold.
    decode.spoil = lambda chunk: chunk.update(padding="x" * 2**20)
    _, writer = await send(stand, request(max_tokens=50, stream=True))
    await until(lambda: stand.metric("pdlaunch_router_generation_tokens_total"))
    pass_time(SPEC.request_timeout_s)
    await until(lambda: decode.num_aborted)
    await until(lambda: not stand.router.admission.in_flight)
    assert stand.metric('pdlaunch_router_request_errors_total{model_name="tiny",status="503"}') == 1
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def assert_refused(answer: Answer) -> None:
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"]["code"] == "draining"


def start(stand: Stand, **fields: Any) -> asyncio.Task[Answer]:
    return asyncio.create_task(stand.post(completion(**fields)))


async def test_a_stream_ends_with_an_error_and_a_whole_request_is_503(stand: Stand) -> None:
    _, decode = await stand.start_pair()
    decode.hold_after = 2
    streamed, whole, many = start(stand, stream=True), start(stand), start(stand, prompt=["a", "b"])
    await until(lambda: stand.metric("pdlaunch_router_generation_tokens_total") >= 4 * 3)
    await stand.router.close()
    answer = await streamed
    assert answer.status == 200
    assert answer.texts() == {0: expected_text("hello", 3)}
    assert answer.events()[-1]["error"]["code"] == "draining"
    assert_refused(await whole)
    assert_refused(await many)
    assert stand.router.admission.in_flight == 0
    await until(lambda: decode.num_aborted == 4)
    assert_refused(await stand.post(completion()))


FAULTS = ((None, None), (0, None), (None, 0), (1, 1), (None, 3), (3, 0))
"""Chunks after which the prefill engine and one of two decode engines break off, by round."""


async def ask_somehow(stand: Stand, number: int, *, leaves: bool = False) -> bytes | None:
    """Read the answer to its end, or leave somewhere before it (None)."""
    chance = random.Random(number)
    raw = request(prompt=f"prompt {number}", stream=chance.random() < 0.7)
    raw = raw.replace(b"Host", b"Connection: close\r\nHost", 1)
    leaves = leaves or chance.random() < 0.5
    reader, writer = await send(stand, raw[: chance.choice((10, -1, None))] if leaves else raw)
    try:
        if not leaves:
            return await reader.read()
        for _ in range(chance.randrange(30)):
            await asyncio.sleep(0)
        return None
    finally:
        writer.transport.abort()


async def come_to_rest(stand: Stand) -> None:
    await until(lambda: not stand.router.admission.in_flight)
    await stand.state.settled()
    await stand.state.client._calls.close()


async def test_of_clients_that_leave_and_engines_that_break_off_nothing_is_left(
    stand: Stand,
) -> None:
    prefill, decode = pair()
    other = FakeEngine("decode-1", "decode")
    await stand.start([prefill, decode, other])
    assert await ask_somehow(stand, 1)
    await come_to_rest(stand)
    before, tasks = num_open_fds(), len(asyncio.all_tasks())
    for round_, (prefill.die_after, decode.die_after) in enumerate(FAULTS):
        numbers = range(12 * round_, 12 * round_ + 12)
        answers = await asyncio.gather(*(ask_somehow(stand, number) for number in numbers))
        assert any(answers)
        assert all(answer is None or b"choices" in answer for answer in answers)
        await come_to_rest(stand)
    # Engines that would never end.
    decode.die_after, decode.hold_after, other.hold_after = None, 1, 1
    await asyncio.gather(*(ask_somehow(stand, number, leaves=True) for number in range(100, 130)))
    await come_to_rest(stand)
    await until(lambda: num_open_fds() <= before)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert all(engine.num_streams == engine.num_works == 0 for engine in stand.pool.engines)
