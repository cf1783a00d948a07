"""A router that leaves while requests run: each is told so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.conftest import Answer, Stand, pair
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import completion, expected_text


def assert_refused(answer: Answer) -> None:
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"]["code"] == "draining"


def start(stand: Stand, **fields: Any) -> asyncio.Task[Answer]:
    return asyncio.create_task(stand.post(completion(**fields)))


async def test_a_stream_ends_with_an_error_and_a_whole_request_is_503(stand: Stand) -> None:
    prefill, decode = pair()
    decode.hold_after = 2
    await stand.start([prefill, decode])
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


async def test_a_stream_that_has_not_begun_is_503_and_its_lease_ends(stand: Stand) -> None:
    prefill, decode = pair()
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    streamed = start(stand, stream=True)
    await prefill.holding.wait()
    await stand.router.close()
    assert_refused(await streamed)
    await prefill.release_event.wait()
    assert not decode.seen


@pytest.mark.parametrize("stream", [True, False])
async def test_nobody_waits_for_an_engine_any_more(stand: Stand, stream: bool) -> None:
    prefill, decode = pair()
    await stand.start([prefill, decode])
    stand.die_after(decode, 2, num_told=3)
    running = start(stand, stream=stream)
    await until(lambda: decode.seen)
    stand.publish(without=["prefill-0", "decode-0"])
    await until(lambda: stand.metric("pdlaunch_router_engine_failures_total"))
    await stand.router.close()
    answer = await running
    if stream:
        assert answer.events()[-1]["error"]["code"] == "draining"
    else:
        assert_refused(answer)
    assert stand.metric("pdlaunch_router_migrations_total") == 0
