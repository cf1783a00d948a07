"""Decode engines that are told of a prompt while prefill computes it."""

from __future__ import annotations

from typing import Any

import pytest

from pdlaunch.router.client_request import REMOTE_DECODE
from tests.router.conftest import Stand, pair, pairs
from tests.router.fake_engine import FakeEngine
from tests.router.test_disconnects import all_is_quiet, send
from tests.router.test_life_of_a_request import CHAT, MESSAGES, chat, completion, expected_text


def lend(engines: list[FakeEngine]) -> list[FakeEngine]:
    """All of them can wait for leases of the prefill engines."""
    for engine in engines:
        engine.lenders = [lender for lender in engines if lender.role == "prefill"]
    return engines


async def let_go_once_told(prefill: FakeEngine, decode: FakeEngine) -> None:
    await decode.asked_to_wait.wait()
    prefill.go.set()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_decode_knows_of_the_prompt_before_prefill_answers(stand: Stand, stream: bool, path: str) -> None:
    prefill, decode = lend(pair())
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    stand.hops.spawn(let_go_once_told(prefill, decode))
    answer = await stand.post(chat(stream=stream) if path == CHAT else completion(stream=stream), path=path)
    assert answer.texts() == {0: expected_text(MESSAGES if path == CHAT else "hello", 6)}
    (told,) = decode.seen
    (asked,) = prefill.seen
    lease_id = asked.body["kv_transfer_params"].pop("pdlaunch")["lease_id"]
    assert asked.body["kv_transfer_params"] == REMOTE_DECODE
    params = told.body["kv_transfer_params"]
    assert params["remote_request_id"] == lease_id
    assert (params["remote_engine_id"], params["remote_host"], params["remote_port"]) == ("id-of-prefill-0", "127.0.0.1", 1)
    assert params["pdlaunch"]["awaits_lease"] is True
    assert prefill.released == []
    await stand.hops.settled()
    assert all(engine.prompt_tokens == engine.num_streams == 0 for engine in stand.pool.engines)


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_what_decode_has_against_it_is_as_if_it_had_not_been_told(stand: Stand, status: int) -> None:
    prefill, decode = lend(pair())
    decode.wait_status = status
    await stand.start([prefill, decode])
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    _, usual = decode.seen
    assert usual.body["kv_transfer_params"]["pdlaunch"]["first_token_sent"] is True
    assert stand.metric("pdlaunch_router_engine_failures_total") == stand.metric("pdlaunch_router_retries_total") == 0


async def test_an_answer_that_ends_with_prefill_needs_decode_no_more(stand: Stand) -> None:
    prefill, decode = lend(pair())
    prefill.ends = {0: 1}
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    stand.hops.spawn(let_go_once_told(prefill, decode))
    answer = await stand.post(completion(stream=True))
    assert answer.finish_reasons() == {0: ["stop"]}
    await decode.aborted.wait()
    assert len(decode.seen) == 1


async def test_another_prefill_engine_means_another_lease(stand: Stand) -> None:
    engines = lend(pairs(2))
    engines[0].die_after = 0
    await stand.start(engines)
    answer = await stand.post(completion())
    assert answer.texts() == {0: expected_text("hello", 6)}
    asked = [engine.seen[0].body["kv_transfer_params"]["pdlaunch"]["lease_id"] for engine in engines[:2]]
    assert len(set(asked)) == 2
    await stand.hops.settled()
    assert sum(engine.num_streams for engine in stand.pool.engines) == 0


async def test_a_stream_that_breaks_goes_on_elsewhere(stand: Stand) -> None:
    engines = lend(pairs(2))
    await stand.start(engines)
    stand.die_after(stand.engines["decode-0"], 2, num_told=3)
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert stand.metric("pdlaunch_router_migrations_total") == 1


async def test_clients_that_leave_meanwhile(stand: Stand) -> None:
    prefill, decode = lend(pair())
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    _, writer = await send(stand, completion(stream=True))
    await decode.asked_to_wait.wait()
    writer.close()
    await decode.aborted.wait()
    await prefill.aborted.wait()
    await all_is_quiet(stand)
    assert len(prefill.released) == 1


@pytest.mark.parametrize("fields", [{"n": 2}, {"max_tokens": 1}])
async def test_who_is_not_told(stand: Stand, fields: dict[str, Any]) -> None:
    prefill, decode = lend(pair())
    await stand.start([prefill, decode])
    answer = await stand.post(completion(**fields))
    assert answer.status == 200
    assert not decode.asked_to_wait.is_set()
